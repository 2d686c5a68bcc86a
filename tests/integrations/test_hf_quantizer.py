"""transformers' `from_pretrained`, `generate` and `save_pretrained` on packed weights, once sarqc is imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

import sarqc
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.integrations.register import can_pack
from sarqc.model.packed_linear import PackedWeight, QuantExperts, QuantLinear
from tests.support import families, tiny

SETTINGS = {
    "w4": dict(bits=4, group_size=32),
    "w3 asymmetric": dict(bits=3, group_size=32, sym=False),
    "gptq": dict(bits=4, group_size=32, format="gptq"),
    "awq": dict(bits=4, group_size=32, sym=False, format="awq"),
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """quantized(kind, **settings): a rounded checkpoint of a tiny model; each is made once."""
    made = {}

    def make(kind, **settings):
        key = (kind, *sorted(settings.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            source = tiny.save(kind, folder / "source")
            made[key] = sarqc.quantize(source, folder / "out", method="rtn", **settings).out
        return made[key]

    return make


def load(folder, **how):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    assert not any(info.values()), info
    return model


def tokens(*shape):
    return torch.randint(3, tiny.VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def logits(model, ids):
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
def test_weights_stay_packed_and_come_back_to_the_byte(registered, quantized, tmp_path, kind, settings):
    folder = quantized(kind, **SETTINGS[settings])
    model = load(folder)
    ours, _ = sarqc.load(folder, packed=True)
    assert torch.equal(logits(model, tokens(2, 12)), logits(ours, tokens(2, 12)))
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    assert len(packed) == sum(isinstance(module, PackedWeight) for module in ours.modules())
    assert any(isinstance(module, QuantExperts) for module in packed) == (kind != "llama")
    model.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # transformers keeps parts of deepseek's router in fp32, with the same values
        assert torch.equal(after[name], tensor), name
        assert after[name].dtype == tensor.dtype or name.endswith(("e_score_correction_bias", "mlp.gate.weight"))
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_memory_is_the_packed_size(registered, quantized):
    """Nothing of 16 bits is as large as a packed layer, and the Linears together stay below 0.3 of their bf16 form."""
    model = load(quantized("llama", bits=4, group_size=32))
    packed = [module for module in model.modules() if isinstance(module, QuantLinear)]
    stored = sum(tensor.numel() * tensor.element_size() for module in packed for tensor in module.buffers())
    padded = sum(-(-module.out_features // 64) * 64 * module.in_features for module in packed)
    assert stored == padded * (0.5 + 4 / 32)
    dense = {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert dense == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_it_generates_in_batches_as_alone(registered, quantized, kind):
    model = load(quantized(kind, bits=4, group_size=32), dtype=torch.float32)
    ids = tokens(3, 9)
    ids[1, :4] = 0
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **options)
    for row, start in ((0, 0), (1, 4), (2, 0)):
        alone = model.generate(ids[row : row + 1, start:], attention_mask=mask[row : row + 1, start:], **options)
        assert torch.equal(together[row, start:], alone[0])
    slow = ids[:1]
    for _ in range(6):  # without the cache
        slow = torch.cat([slow, logits(model, slow)[:, -1:].argmax(-1)], 1)
    assert torch.equal(together[0], slow[0])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_it_compiles_into_one_graph(registered, quantized, kind, backend):
    model = load(quantized(kind, bits=4, group_size=32))
    ids = tokens(2, 7)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_casting_keeps_the_codes_and_picks_the_layout_anew(quantized, kind):
    folder = quantized(kind, bits=4, group_size=32)
    model, _ = sarqc.load(folder, packed=True, dtype="bfloat16")
    wide, _ = sarqc.load(folder, packed=True, dtype="float32")
    projection, other = (each.model.layers[0].self_attn.q_proj for each in (model, wide))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    before, bf16 = projection.codes(), projection(x.bfloat16())
    assert projection.layout == "int4pack"
    model.to(torch.float32)
    after = projection.codes()
    assert projection.layout == other.layout == "stream"
    assert torch.equal(before.codes, after.codes) and torch.equal(before.scales, after.scales)
    assert after.scales.dtype == torch.bfloat16
    assert torch.equal(projection(x), other(x))
    assert torch.equal(logits(model, tokens(1, 8)), logits(wide, tokens(1, 8)))  # all that was dense was bf16 on disk
    assert torch.equal(model.bfloat16().model.layers[0].self_attn.q_proj(x.bfloat16()), bf16)
    assert model.to("meta").model.layers[0].self_attn.q_proj.words.is_meta


def test_what_is_quantized_in_part_is_expanded_where_it_must(registered, quantized):
    """One expert of a stack, and one Linear, are left at 16 bits."""
    ignore = (r"layers\.0.*experts\.1\.w2", r"layers\.1\.self_attn\.q_proj")
    folder = quantized("mixtral", bits=4, group_size=32, ignore=ignore)
    model = load(folder)
    first, second = model.model.layers
    assert isinstance(first.mlp.experts.down_proj, torch.nn.Parameter)
    assert isinstance(first.mlp.experts.gate_up_proj, QuantExperts)
    assert isinstance(second.self_attn.q_proj, torch.nn.Linear)
    source = open_checkpoint(folder)
    for expert in range(4):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"
        assert torch.equal(first.mlp.experts.down_proj[expert], source.load(name))
    ours, _ = sarqc.load(folder, packed=True)
    assert torch.equal(logits(model, tokens(1, 8)), logits(ours, tokens(1, 8)))
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(folder.parent / "again")


def test_a_conversion_of_which_a_part_is_packed_is_read_by_sarqc(registered, tmp_path):
    """One conversion of transformers makes experts of text, which are packed, and of images, which are not."""
    row = "ernie4_5_vl_moe+vl"
    source = families.save(row, tmp_path / "in")
    out = families.rounded(source, tmp_path / "out")
    assert families.apart(families.logits(out, row), families.ours(out)) < 0.05
    experts = "language_model.layers.1.mlp.vision_moe.experts"
    original, packed = (AutoModelForMultimodalLM.from_pretrained(folder).model for folder in (source, out))
    for projection in ("gate_up_proj", "down_proj"):
        name = f"{experts}.{projection}"
        assert torch.equal(packed.get_parameter(name), original.get_parameter(name))


def test_a_device_map_is_followed(registered, quantized):
    model = load(quantized("mixtral", bits=4, group_size=32), device_map="auto")
    assert model.device.type == "cpu"
    assert torch.equal(
        logits(model, tokens(1, 8)), logits(load(quantized("mixtral", bits=4, group_size=32)), tokens(1, 8))
    )


def test_only_weights_that_we_run_are_taken(registered, quantized):
    config = json.loads((quantized("llama", bits=4, group_size=32) / "config.json").read_text())["quantization_config"]
    assert can_pack(config)
    assert not can_pack(config | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}})
    assert not can_pack(config | {"format": "float-quantized"})
    assert not can_pack(config | {"quant_method": "bitsandbytes"})
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    assert can_pack(awq) and can_pack(gptq)
    assert not can_pack(awq | {"version": "gemv"}) and not can_pack(gptq | {"bits": 5})
    group = config["config_groups"]["group_0"]
    activations = {"config_groups": {"group_0": group | {"input_activations": {"num_bits": 8}}}}
    assert not can_pack(config | activations)
    from transformers.quantizers.auto import AutoQuantizationConfig

    assert type(AutoQuantizationConfig.from_dict(dict(config))).__name__ == "PackedConfig"
    others = AutoQuantizationConfig.from_dict(config | activations)
    assert type(others).__name__ == "CompressedTensorsConfig"


def test_unregistering_gives_transformers_its_own_way_back(quantized):
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    before = dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    sarqc.register()
    sarqc.register()
    assert before[0] != AUTO_QUANTIZER_MAPPING
    sarqc.unregister()
    assert before == (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING)
    model = load(quantized("llama", bits=4, group_size=32))
    assert not any(isinstance(module, PackedWeight) for module in model.modules())


SEAT = (
    "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table; "
    "print(type(table['compressed-tensors']).__name__)"
)


@pytest.mark.parametrize(
    ("statement", "result"),
    [
        ("import sarqc; sarqc.register(); from transformers import AutoModelForCausalLM", "TableEntry"),
        ("from transformers import AutoModelForCausalLM; import sarqc", "TableEntry"),
        ("import sarqc; sarqc.unregister(); import transformers", "ABCMeta"),
    ],
)
def test_the_order_of_imports_does_not_matter(statement, result):
    hooks = "[f for f in sys.meta_path if type(f).__name__ == 'PostImportHook']"
    check = f"{statement}; {SEAT}; import sys; assert not {hooks}"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == result


@pytest.mark.parametrize("row", ["hunyuan_v1_moe", "deepseek_v32", "mamba"])
def test_code_that_reads_a_packed_weight_runs(registered, tmp_path, row):
    """These ask a Linear for its weight's dtype, or multiply with the weight themselves."""
    out = families.rounded(families.save(row, tmp_path / "in"), tmp_path / "out")
    model = load(out, dtype=torch.float32)
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    assert families.apart(logits(model, families.TOKENS), families.ours(out)) < 0.05

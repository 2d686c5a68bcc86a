"""A model run block by block is the model, bit for bit, and a checkpoint that does not fit is refused by name."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from torch import Tensor

from sarqc.checkpoint.reader import open_checkpoint
from sarqc.errors import ModelError
from sarqc.model.lazy_model import LazyModel
from sarqc.pipeline.forward import Forward
from sarqc.pipeline.points import Hooks, Point
from tests.support import families
from tests.support.models import StateDictSource

HALF = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def run_by_block(lazy: LazyModel, source, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Logits, in the model's own forward, with each block loaded when it is entered and given back behind it."""
    lazy.load_outer(source, dtype=dtype, head=True)

    def run() -> Tensor:
        return lazy.model(input_ids=tokens, use_cache=False).logits

    with Hooks(lazy.blocks), Forward([run], lazy.blocks) as forward:
        for index in range(len(lazy.blocks)):
            list(forward.at(Point("enter", index)))
            lazy.load_block(index, source, dtype=dtype)
            list(forward.leave(index))
            lazy.unload_block(index)
        (end,) = forward.at(Point("end", len(lazy.blocks)))
        return end.output


def test_a_dtype_of_its_own_leaves_a_buffer_that_is_not_set(tmp_path):
    folder = families.save("qwen3", tmp_path)
    with open_checkpoint(folder) as source:
        lazy = LazyModel.from_folder(folder, source)

    def with_one_unset(build, dtype):
        model = build(dtype)
        model.register_buffer("unset", None, persistent=False)
        return model

    lazy._build = partial(with_one_unset, lazy._build)
    lazy.use_dtype(torch.float16)
    assert lazy.dtype == torch.float16


def test_a_wrapper_says_the_device_that_its_text_runs_on(tmp_path):
    """transformers takes the first parameter's device for a model's; it may be that of a tower, which is not loaded."""
    folder = families.save("idefics3+vl", tmp_path)
    with open_checkpoint(folder) as source:
        lazy = LazyModel.from_folder(folder, source)
        lazy.load_outer(source)
    models = [module for module in lazy.model.modules() if isinstance(module, transformers.PreTrainedModel)]
    assert len(models) > 2 and {model.device.type for model in models} == {"cpu"}


@HALF
def test_block_by_block_gives_the_models_own_logits(tiny, any_arch, dtype):
    case = tiny(any_arch, dtype)
    with torch.no_grad():
        expected = case.model(case.tokens, use_cache=False).logits
    actual = run_by_block(case.lazy(), case.source, case.tokens)
    if any_arch == "gpt_oss":  # its eager adds the bias after the product, a Linear inside it: one rounding apart
        torch.testing.assert_close(actual, expected, rtol=0, atol=2 * torch.finfo(dtype).eps * expected.abs().max())
    else:
        assert torch.equal(actual, expected)


@HALF
def test_buffers_are_those_of_an_ordinary_model(tiny, any_arch, dtype):
    case = tiny(any_arch, dtype)
    expected = dict(case.model.named_non_persistent_buffers())
    buffers = dict(case.lazy().model.named_non_persistent_buffers())
    assert buffers.keys() == expected.keys() and buffers
    for name, buffer in expected.items():
        assert buffers[name].dtype == buffer.dtype and torch.equal(buffers[name], buffer)


def test_every_checkpoint_name_is_used_exactly_once(tiny, any_arch):
    case = tiny(any_arch)
    used = [stored.name for slices in case.lazy().slices.values() for stored in slices]
    assert sorted(used) == sorted(case.source.names())


def test_a_checkpoint_in_bf16_runs_in_fp32_as_transformers_runs_it(tiny):
    case = tiny("gemma3", torch.bfloat16)  # its embedding scale is a buffer in the model's own dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32).eval()
    lazy = case.lazy()
    assert lazy.dtype == torch.bfloat16
    with torch.no_grad():
        expected = model(case.tokens, use_cache=False).logits
    assert torch.equal(run_by_block(lazy, case.source, case.tokens, torch.float32), expected)
    assert lazy.dtype == lazy.model.dtype == torch.float32


def test_only_the_asked_tensors_are_read(tiny):
    case = tiny("llama", tie_word_embeddings=False)
    lazy = case.lazy()
    assert not case.source.reads and all(parameter.is_meta for parameter in lazy.model.parameters())
    lazy.load_outer(case.source)
    assert sorted(case.source.reads) == ["model.embed_tokens.weight", "model.norm.weight"]
    case.source.reads.clear()
    lazy.load_block(1, case.source)
    assert case.source.reads and all(name.startswith("model.layers.1.") for name in case.source.reads)
    lazy.unload_block(1)
    lazy.unload_outer()
    assert all(parameter.is_meta for parameter in lazy.model.parameters())


def test_a_tied_head_is_the_embedding(tiny):
    case = tiny("llama")
    assert "lm_head.weight" not in case.source.names()
    lazy = case.lazy()
    lazy.load_outer(case.source, head=True)
    assert lazy.model.lm_head.weight is lazy.model.model.embed_tokens.weight


def test_a_checkpoint_with_only_the_head_of_a_tied_pair(tiny):
    case = tiny("llama")
    tensors = case.tensors()
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    source = StateDictSource(tensors)
    with torch.no_grad():
        expected = case.model(case.tokens, use_cache=False).logits
    assert torch.equal(run_by_block(case.lazy(source), source, case.tokens), expected)


def test_what_transformers_keeps_in_fp32_stays_fp32(tiny):
    case = tiny("deepseek_v3", torch.bfloat16)
    lazy = case.lazy()
    lazy.load_block(1, case.source)
    bias = lazy.model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, case.source.load("model.layers.1.mlp.gate.e_score_correction_bias").float())


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("llama", "model.layers.1.self_attn.k_proj.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
    ],
)
def test_a_missing_tensor_is_named(tiny, name, lost):
    case = tiny(name)
    tensors = case.tensors()
    del tensors[lost]
    with pytest.raises(ModelError, match=f"lacks tensor '{lost}'"):
        case.lazy(StateDictSource(tensors))


def test_a_whole_missing_expert_is_named(tiny):
    case = tiny("qwen3_moe")
    tensors = {name: tensor for name, tensor in case.tensors().items() if "layers.0.mlp.experts.3." not in name}
    with pytest.raises(ModelError, match=r"lacks tensor 'model\.layers\.0\.mlp\.experts\.3\."):
        case.lazy(StateDictSource(tensors))


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_wrong_shape_is_named(tiny, name):
    case = tiny("llama")
    tensors = case.tensors()
    tensors[name] = tensors[name][:-1]
    with pytest.raises(ModelError, match=name):
        case.lazy(StateDictSource(tensors))


def test_a_wrong_shape_of_one_expert_is_named(tiny):
    case = tiny("olmoe")
    tensors = case.tensors()
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name] = tensors[name][:-1]
    with pytest.raises(ModelError, match=name):
        case.lazy(StateDictSource(tensors))


def test_tensors_the_model_has_no_use_for_are_left_alone(tiny):
    case = tiny("llama")
    source = StateDictSource(case.tensors() | {"model.layers.2.eh_proj.weight": torch.zeros(3, 3)})
    assert len(case.lazy(source).blocks) == 2


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.T5Config(), "encoder"),
        (transformers.ViTConfig(), "not a language model"),
        (transformers.BertConfig(architectures=["BertForMaskedLM"]), "not a language model"),
    ],
    ids=["t5", "vit", "bert"],
)
def test_what_is_not_a_text_decoder_is_refused(config, reason):
    with pytest.raises(ModelError, match=reason):
        LazyModel.from_config(config, StateDictSource({}))


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no usable configuration"):
        LazyModel.from_folder(tmp_path, StateDictSource({}))


def test_nothing_global_is_touched_and_the_configuration_is_not_changed(tiny):
    case = tiny("mixtral", torch.bfloat16)
    config = transformers.AutoConfig.from_pretrained(case.folder)
    before = config.to_dict()
    state, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    LazyModel.from_config(config, case.source).use_dtype(torch.float32)
    assert torch.equal(state, torch.random.get_rng_state()) and dtype == torch.get_default_dtype()
    assert config.to_dict() == before
    assert not torch.nn.Linear(2, 2).weight.is_meta

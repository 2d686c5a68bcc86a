"""A checkpoint comes back as a model that runs: dense, or with its codes packed."""

from __future__ import annotations

import pytest
import torch
import transformers

from sarqc.config import QuantConfig
from sarqc.model import moe
from sarqc.model.build import build
from sarqc.model.layers import targets
from sarqc.model.lazy_model import LazyModel
from sarqc.model.packed_linear import QuantExperts, QuantLinear
from sarqc_kernels.w4a16 import unpack_weight
from tests.support.models import StateDictSource

QUANT = QuantConfig(bits=4, group_size=32)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def test_a_dense_checkpoint_is_the_model(tiny, any_arch):
    case = tiny(any_arch)
    model = build(case.lazy(), case.source)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    rounding = 2e-6 if any_arch == "gpt_oss" else 0.0  # its bias, see test_lazy_model
    torch.testing.assert_close(logits(model, case.tokens), logits(case.model, case.tokens), rtol=0, atol=rounding)


def test_packed_and_dense_agree(tiny, arch, rounded):
    case = tiny(arch)
    source = rounded(case, QUANT)
    dense = build(case.lazy(source), source)
    packed = build(case.lazy(source), source, packed=True)
    linears = sum(isinstance(module, QuantLinear) for module in packed.modules())
    stacks = sum(isinstance(module, QuantExperts) for module in packed.modules())
    selected = targets(case.lazy(), QUANT).selected
    assert linears + stacks == len({target.parameter for target in selected})
    assert stacks == len({target.parameter for target in selected if ".experts." in target.parameter})
    assert not any(tensor.is_meta for tensor in (*packed.parameters(), *packed.buffers()))
    expected = logits(dense, case.tokens)
    assert not torch.equal(expected, logits(case.model, case.tokens))
    torch.testing.assert_close(
        logits(packed, case.tokens), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )


@pytest.mark.parametrize("bits", [3, 8])
def test_other_widths_and_asymmetric_grids(tiny, rounded, bits):
    case = tiny("mixtral")
    source = rounded(case, QuantConfig(bits=bits, group_size=32, sym=False))
    dense, packed = (build(case.lazy(source), source, packed=packed) for packed in (False, True))
    assert any(isinstance(m, QuantExperts) and m.zeros is not None and m.bits == bits for m in packed.modules())
    torch.testing.assert_close(logits(packed, case.tokens), logits(dense, case.tokens), rtol=1e-4, atol=1e-4)


def test_bf16_on_a_cpu_takes_torchs_int4_product(tiny, rounded):
    case = tiny("llama", torch.bfloat16)
    source = rounded(case, QUANT)
    dense, packed = (build(case.lazy(source), source, packed=packed) for packed in (False, True))
    layouts = {module.layout for module in packed.modules() if isinstance(module, QuantLinear)}
    assert layouts == {"int4pack"}
    exact = logits(build(case.lazy(source), source, dtype=torch.float32), case.tokens)
    off = (logits(packed, case.tokens).float() - exact).norm()
    assert off < 1.25 * (logits(dense, case.tokens).float() - exact).norm()  # weights are not even rounded to bf16


def test_packed_weights_are_small_and_give_their_codes_back(tiny, rounded):
    case = tiny("mixtral", torch.bfloat16)
    source = rounded(case, QUANT)
    packed = build(case.lazy(source), source, packed=True)
    actual = [module for module in packed.modules() if isinstance(module, (QuantLinear, QuantExperts))]
    for module in actual:
        stored = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
        assert stored <= (0.5 + 4 / 32) * module.words.shape[0] * (
            -(-module.out_features // 64) * 64 * module.in_features
        )
    name = "model.layers.0.self_attn.q_proj"
    codes, scales, zeros = unpack_weight(packed.get_submodule(name).prepared())
    want = source.quantized(name)
    assert torch.equal(codes, want.codes) and torch.equal(scales, want.scales) and zeros is None


def test_packed_experts_run_as_one_operation_and_as_two_products_alike(tiny, moe_arch, rounded, monkeypatch):
    case = tiny(moe_arch)
    source = rounded(case, QUANT)
    packed = build(case.lazy(source), source, packed=True)
    layers = [module for module in packed.modules() if moe.is_experts(module)]
    assert layers and all(moe.is_fused(layer) for layer in layers)
    one = logits(packed, case.tokens)
    layers[0].act_fn = torch.nn.GELU()
    assert not moe.is_fused(layers[0])
    layers[0].act_fn = torch.nn.SiLU()
    monkeypatch.setattr(moe, "is_fused", lambda module: False)
    torch.testing.assert_close(logits(packed, case.tokens), one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiles_into_one_graph(tiny, rounded, dtype):
    case = tiny("qwen2", dtype)
    source = rounded(case, QUANT)
    linear = build(case.lazy(source), source, packed=True).model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, linear.in_features, dtype=dtype)
    with torch.no_grad():
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), linear(x))


def test_biases_are_added(tiny, rounded):
    case = tiny("qwen2")
    assert case.model.model.layers[0].self_attn.q_proj.bias.abs().min() > 0
    source = rounded(case, QUANT)
    packed = build(case.lazy(source), source, packed=True).model.layers[0].self_attn.q_proj
    assert isinstance(packed, QuantLinear)
    assert torch.equal(packed(torch.zeros(2, 3, 64)), packed.bias.expand(2, 3, -1))


@pytest.mark.parametrize("packed", [False, True])
def test_it_generates(tiny, arch, rounded, packed):
    case = tiny(arch)
    source = rounded(case, QUANT)
    model = build(case.lazy(source), source, packed=packed)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    out = model.generate(case.tokens[:1, :6], attention_mask=torch.ones(1, 6, dtype=torch.int64), **options)
    assert out.shape == (1, 10) and torch.equal(out[:, :6], case.tokens[:1, :6])


def test_what_a_checkpoint_leaves_dense_stays_dense(tiny, rounded):
    case = tiny("mixtral")
    source = rounded(case, QuantConfig(bits=4, group_size=32, ignore=("q_proj", r"layers\.0.*experts\.1\.w2")))
    dense, packed = (build(case.lazy(source), source, packed=packed) for packed in (False, True))
    first, second = packed.model.layers
    assert isinstance(first.self_attn.q_proj, torch.nn.Linear) and isinstance(first.self_attn.k_proj, QuantLinear)
    assert isinstance(first.mlp.experts.gate_up_proj, QuantExperts)
    assert isinstance(first.mlp.experts.down_proj, torch.nn.Parameter)  # one expert of it is not quantized
    assert isinstance(second.mlp.experts.down_proj, QuantExperts)
    torch.testing.assert_close(logits(packed, case.tokens), logits(dense, case.tokens), rtol=1e-4, atol=1e-4)


def test_dtype_and_configuration(tiny):
    case = tiny("llama", torch.bfloat16)
    config = transformers.AutoConfig.from_pretrained(case.folder)
    source = StateDictSource(case.tensors())
    model = build(LazyModel.from_config(config, source), source, dtype=torch.float32)
    assert model.dtype == torch.float32 and not model.training
    assert build(LazyModel.from_config(config, source), source).dtype == torch.bfloat16

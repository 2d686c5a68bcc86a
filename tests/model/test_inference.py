"""A checkpoint comes back as a model that runs: dense, or with its codes packed."""

from __future__ import annotations

import pytest
import torch
import transformers

from sarqc.model.inference import QuantExperts, QuantLinear, build
from sarqc.model.source import StateDictSource
from sarqc.model.targets import targets
from sarqc.spec import QuantSpec

QUANT = QuantSpec(bits=4, group_size=32)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def test_a_dense_checkpoint_is_the_model(tiny, any_arch):
    case = tiny(any_arch)
    model = build(case.skeleton(), case.source)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    rounding = 2e-6 if any_arch == "gpt_oss" else 0.0  # its bias, see test_skeleton
    torch.testing.assert_close(logits(model, case.tokens), logits(case.model, case.tokens), rtol=0, atol=rounding)


def test_packed_and_dense_agree(tiny, arch, rounded):
    case = tiny(arch)
    source = rounded(case, QUANT)
    dense = build(case.skeleton(source), source)
    packed = build(case.skeleton(source), source, packed=True)
    linears = sum(isinstance(module, QuantLinear) for module in packed.modules())
    stacks = sum(isinstance(module, QuantExperts) for module in packed.modules())
    found = targets(case.skeleton(), QUANT).selected
    assert linears + stacks == len({target.parameter for target in found})
    assert stacks == len({target.parameter for target in found if ".experts." in target.parameter})
    assert not any(tensor.is_meta for tensor in (*packed.parameters(), *packed.buffers()))
    expected = logits(dense, case.tokens)
    assert not torch.equal(expected, logits(case.model, case.tokens))
    torch.testing.assert_close(
        logits(packed, case.tokens), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )


@pytest.mark.parametrize("bits", [3, 8])
def test_other_widths_and_asymmetric_grids(tiny, rounded, bits):
    case = tiny("mixtral")
    source = rounded(case, QuantSpec(bits=bits, group_size=32, sym=False))
    dense, packed = (build(case.skeleton(source), source, packed=packed) for packed in (False, True))
    assert any(isinstance(m, QuantExperts) and m.zeros is not None and m.bits == bits for m in packed.modules())
    torch.testing.assert_close(logits(packed, case.tokens), logits(dense, case.tokens), rtol=1e-4, atol=1e-4)


def test_biases_are_added(tiny, rounded):
    case = tiny("qwen2")
    assert case.model.model.layers[0].self_attn.q_proj.bias.abs().min() > 0
    source = rounded(case, QUANT)
    packed = build(case.skeleton(source), source, packed=True).model.layers[0].self_attn.q_proj
    assert isinstance(packed, QuantLinear)
    assert torch.equal(packed(torch.zeros(2, 3, 64)), packed.bias.expand(2, 3, -1))


@pytest.mark.parametrize("packed", [False, True])
def test_it_generates(tiny, arch, rounded, packed):
    case = tiny(arch)
    source = rounded(case, QUANT)
    model = build(case.skeleton(source), source, packed=packed)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    out = model.generate(case.tokens[:1, :6], attention_mask=torch.ones(1, 6, dtype=torch.int64), **options)
    assert out.shape == (1, 10) and torch.equal(out[:, :6], case.tokens[:1, :6])


def test_what_a_checkpoint_leaves_dense_stays_dense(tiny, rounded):
    case = tiny("mixtral")
    source = rounded(case, QuantSpec(bits=4, group_size=32, ignore=("q_proj", r"layers\.0.*experts\.1\.w2")))
    dense, packed = (build(case.skeleton(source), source, packed=packed) for packed in (False, True))
    first, second = packed.model.layers
    assert isinstance(first.self_attn.q_proj, torch.nn.Linear) and isinstance(first.self_attn.k_proj, QuantLinear)
    assert isinstance(first.mlp.experts.gate_up_proj, QuantExperts)
    assert isinstance(first.mlp.experts.down_proj, torch.nn.Parameter)  # one expert of it is not quantized
    assert isinstance(second.mlp.experts.down_proj, QuantExperts)
    torch.testing.assert_close(logits(packed, case.tokens), logits(dense, case.tokens), rtol=1e-4, atol=1e-4)


def test_dtype_and_configuration(tiny):
    case = tiny("llama", torch.bfloat16)
    config = transformers.AutoConfig.from_pretrained(case.folder)
    model = build(config, StateDictSource(case.tensors()), dtype=torch.float32)
    assert model.dtype == torch.float32 and not model.training
    assert build(config, case.source).dtype == torch.bfloat16

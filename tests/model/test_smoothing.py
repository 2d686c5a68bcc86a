"""Where scales can go: found without a table, proved on the block, and exact for the whole model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sarqc.config import QuantConfig
from sarqc.method.awq import ChannelScales
from sarqc.model import smoothing
from sarqc.model.build import build
from sarqc.model.layers import targets
from sarqc.model.sites import SiteChunk, find_sites
from sarqc.pipeline import channel_scales
from sarqc.pipeline.channel_scales import BlockScales
from tests.support.by_block import block_call, embed
from tests.support.models import StateDictSource

QUANT = QuantConfig(group_size=32)
DENSE = {
    "input_layernorm": ["q_proj", "k_proj", "v_proj"],
    "post_attention_layernorm": ["gate_proj", "up_proj"],
    "v_proj": ["o_proj"],
    "up_proj": ["down_proj"],
}
MIXED = DENSE | {"post_attention_layernorm": ["gate", "gate_up_proj"], "gate_up_proj": ["down_proj"]}
EXPECTED = {
    ("llama", 0): DENSE,
    ("qwen2", 1): DENSE,
    ("qwen3", 0): DENSE,
    ("gemma3", 1): DENSE | {"pre_feedforward_layernorm": DENSE["post_attention_layernorm"]},
    ("phi3", 0): {
        "input_layernorm": ["qkv_proj"],
        "post_attention_layernorm": ["gate_up_proj"],
        "qkv_proj": ["o_proj"],
        "gate_up_proj": ["down_proj"],
    },
    ("mixtral", 0): MIXED,
    ("qwen3_moe", 1): MIXED,
    ("qwen2_moe", 1): MIXED
    | {
        "post_attention_layernorm": ["gate_proj", "up_proj", "gate", "gate_up_proj", "shared_expert_gate"],
        "up_proj": ["down_proj"],
    },
    ("deepseek_v3", 1): {
        "input_layernorm": ["q_a_proj", "kv_a_proj_with_mqa"],
        "q_a_layernorm": ["q_b_proj"],
        "kv_a_layernorm": ["kv_b_proj"],
        "post_attention_layernorm": ["gate", "gate_up_proj", "gate_proj", "up_proj"],
        "gate_up_proj": ["down_proj"],
        "up_proj": ["down_proj"],
    },
}
for _name in (("mixtral", 0), ("qwen3_moe", 1)):
    EXPECTED[_name] = {
        smooth_layer: balance_layers
        for smooth_layer, balance_layers in EXPECTED[_name].items()
        if smooth_layer != "up_proj"
    }
del EXPECTED["gemma3", 1]["post_attention_layernorm"]


def loaded(case, index, quant=QUANT):
    lazy = case.lazy()
    lazy.load_outer(case.source)
    hidden = embed(lazy, case.tokens[:1, :8])
    lazy.load_block(index, case.source)
    run = block_call(lazy, index, hidden)
    with torch.no_grad():
        return lazy, find_sites(lazy, targets(lazy, quant).of_block(index), run), run


def leaf(name):
    return name.removesuffix(".weight").rpartition(".")[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "index"), list(EXPECTED))
def test_givers_and_readers_are_found_and_nothing_is_left_changed(tiny, name, index, dtype):
    lazy, sites, run = loaded(tiny(name, dtype), index)
    before = {name: tensor.clone() for name, tensor in lazy.blocks[index].state_dict().items()}
    mappings, reasons = smoothing.find_mappings(lazy, index, sites, run)
    by_name = {
        leaf(mapping.smooth_layer): [leaf(balance_layer) for balance_layer in mapping.balance_layers]
        for mapping in mappings
    }
    assert by_name == EXPECTED[name, index]
    unscaled = {leaf(site.name) for site in sites} - {leaf(site.name) for mapping in mappings for site in mapping.sites}
    assert {leaf(site) for site in reasons} == unscaled == ({"o_proj"} if name == "deepseek_v3" else set())
    after = lazy.blocks[index].state_dict()
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
    )


def test_grouped_heads_follow_the_head_they_share(tiny):
    lazy, sites, run = loaded(tiny("llama"), 0)  # 4 heads of 16 on 2 of keys and values
    mapping = next(
        mapping for mapping in smoothing.find_mappings(lazy, 0, sites, run)[0] if leaf(mapping.smooth_layer) == "v_proj"
    )
    heads = torch.arange(32).view(2, 16).repeat_interleave(2, 0)
    assert torch.equal(mapping.source, heads.flatten()) and mapping.channels == 32


@pytest.mark.parametrize(("name", "offset"), [("llama", 0.0), ("gemma3", 1.0)])
def test_norms_that_store_their_weight_around_zero_are_told_apart(tiny, name, offset):
    lazy, sites, run = loaded(tiny(name), 0)
    norms = [mapping for mapping in smoothing.find_mappings(lazy, 0, sites, run)[0] if "norm" in mapping.smooth_layer]
    assert len(norms) == 2 and all(mapping.offset == offset for mapping in norms)


def test_the_offset_of_a_norm_with_a_bias_is_not_its_bias():
    norm = nn.LayerNorm(16)
    nn.init.constant_(norm.bias, 3.0)
    assert smoothing._offset(norm, torch.randn(4, 16)) == 0


def test_a_reader_that_was_missed_is_noticed(tiny, monkeypatch):
    """The proof does not lean on what was seen: without the router among the readers, the fold must fall."""
    lazy, sites, run = loaded(tiny("mixtral"), 0)
    seen = smoothing._Traced.balance_layers

    def blind(self, model, norm):
        return [name for name in seen(self, model, norm) if not name.endswith(".gate.weight")]

    monkeypatch.setattr(smoothing._Traced, "balance_layers", blind)
    mappings, reasons = smoothing.find_mappings(lazy, 0, sites, run)
    assert {leaf(mapping.smooth_layer) for mapping in mappings} == {"input_layernorm", "v_proj", "gate_up_proj"}
    (site, reason), *others = reasons.items()
    assert not others and "experts" in site and "something else reads" in reason


def test_what_leaves_no_trace_is_not_scaled(tiny):
    """Output projections of zero, as freshly grown layers have them: nothing could be checked, so nothing is done."""
    case = tiny("llama")
    lazy, sites, run = loaded(case, 0)
    lazy.blocks[0].mlp.down_proj.weight.data.zero_()
    mappings, reasons = smoothing.find_mappings(lazy, 0, sites, run)
    assert {leaf(mapping.smooth_layer) for mapping in mappings} == {"input_layernorm", "v_proj"}
    assert len(reasons) == 2 and all("no effect" in reason for reason in reasons.values())


def test_an_activation_in_between_is_no_plain_scaling(tiny):
    """With relu^2 an output grows with the square of its row."""
    lazy, sites, run = loaded(tiny("llama"), 0)
    lazy.blocks[0].mlp.act_fn = nn.SiLU()
    mlp = lazy.blocks[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x))
    mappings, _ = smoothing.find_mappings(lazy, 0, sites, run)
    assert {leaf(mapping.smooth_layer) for mapping in mappings if leaf(mapping.balance_layers[0]) == "down_proj"} == {
        "gate_proj"
    }
    mlp.forward = lambda x: mlp.down_proj((mlp.up_proj(x) * mlp.gate_proj(x)).square())
    mappings, reasons = smoothing.find_mappings(lazy, 0, sites, run)
    assert [leaf(site) for site in reasons] == ["down_proj"]


def folded(case, quant=QUANT, seed=0):
    """The checkpoint in float32, except what is not quantized, with random scales folded in everywhere they can go."""
    generator = torch.Generator().manual_seed(seed)
    tensors = case.tensors()
    everything = {}
    for index in range(len(case.lazy().blocks)):
        lazy, sites, run = loaded(case, index, quant)
        mappings, reasons = smoothing.find_mappings(lazy, index, sites, run)
        scales = BlockScales(lazy, case.source, sites, mappings, reasons)

        def draw(balance_layers, *_, shared, binary, source, channels):
            experts = 1 if shared else len(balance_layers[0].weight)
            result = torch.exp(0.5 * torch.randn(experts, channels, generator=generator))
            result = result.log2().round().exp2() if binary else result
            return ChannelScales(result, torch.ones(experts, dtype=torch.float64))

        chunks = [SiteChunk(site, 0, site.experts) for site in sites]
        gram = SimpleNamespace(rows=torch.ones(1, dtype=torch.int64))  # all that a choice drawn at random looks at
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(channel_scales, "search", draw)
            scales.decide(
                chunks,
                [gram] * len(chunks),
                lambda _, seen: seen,  # type: ignore[return-value]
                lambda _: quant,
                torch.bfloat16,
            )
        for chunk in chunks:
            weight = scales.of(chunk).apply(chunk.weight(lazy.model))
            starts = dict(
                zip(chunk.site.row_ranges, torch.tensor([0, *(s[2] for s in chunk.site.row_ranges)]).cumsum(0).tolist())
            )
            for target in chunk.site.members:
                start = starts[target.parameter, target.start, target.shape[0]]
                tensors[f"{target.linear}.weight"] = weight[target.expert, start : start + target.shape[0]].clone()
        changed = scales.fold_in()
        for name, tensor in changed.items():
            assert tensor.dtype == tensors[name].dtype and not torch.equal(tensor, tensors[name])
        tensors |= changed
        everything |= changed
    return tensors, everything


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_the_unquantized_model_stay_the_same(tiny, arch, dtype):
    """Norms and routers in the checkpoint's own dtype: the scales are those that they can hold."""
    case = tiny(arch, dtype)
    tensors, changed = folded(case)
    source = StateDictSource(tensors)
    before = build(case.lazy(), case.source, dtype=torch.float32)
    after = build(case.lazy(source), source, dtype=torch.float32)
    with torch.no_grad():
        expected, actual = before(case.tokens).logits, after(case.tokens).logits
    assert any("norm" in name for name in changed)
    assert (actual - expected).abs().max() < 2e-5 * expected.abs().max()


def test_ignored_layers_take_their_part_exactly(tiny):
    """A giver, a reader and single experts that are not quantized: scaled where they stand, by powers of two."""
    ignore = ("k_proj", "v_proj", r"layers\.1\..*experts\.1\.w3", r"experts\.0\.w2", r"experts\.2\.w1")
    case = tiny("mixtral", torch.bfloat16)
    tensors, changed = folded(case, QuantConfig(group_size=32, ignore=ignore))
    assert {"k_proj", "v_proj", "w1", "w2", "w3", "gate"} <= {leaf(name) for name in changed}
    for name, tensor in changed.items():
        if "v_proj" in name or "gate" in name:
            ratio = (tensor.double() / case.source.load(name).double()).log2()
            assert torch.equal(ratio, ratio.round())
    source = StateDictSource(tensors)
    before = build(case.lazy(), case.source, dtype=torch.float32)
    after = build(case.lazy(source), source, dtype=torch.float32)
    with torch.no_grad():
        expected, actual = before(case.tokens).logits, after(case.tokens).logits
    assert (actual - expected).abs().max() < 2e-5 * expected.abs().max()


def test_a_closed_channel_of_a_norm_stays_closed(tiny):
    case = tiny("llama", torch.bfloat16)
    name = "model.layers.0.input_layernorm.weight"
    weight = case.source.load(name)
    weight[[2, 5]] = 0
    load = case.source.load
    case.source.load = lambda wanted: weight.clone() if wanted == name else load(wanted)
    tensors, changed = folded(case)
    assert not changed[name][[2, 5]].any() and changed[name].isfinite().all()
    assert all(tensor.isfinite().all() for tensor in tensors.values())

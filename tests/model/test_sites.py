"""What is quantized, what is left, and which layers share an input."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from sarqc.config import QuantConfig
from sarqc.errors import ArgumentError, ModelError
from sarqc.model.layers import auto_group_size, check_group_size, targets
from sarqc.model.sites import find_sites, observe
from sarqc.model.weight_map import TensorSlice
from tests.support.by_block import block_call, call_block, embed
from tests.support.models import StateDictSource

QUANT = QuantConfig(group_size=32)


def sites_of(case, index, quant=QUANT):
    lazy = case.lazy()
    lazy.load_outer(case.source)
    lazy.load_block(index, case.source)
    selected = targets(lazy, quant)
    hidden = torch.randn(1, 8, lazy.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    return lazy, find_sites(lazy, selected.of_block(index), block_call(lazy, index, hidden))


def leaves(site):
    return sorted({member.linear.rpartition(".")[2] for member in site.members})


@pytest.mark.parametrize(
    ("name", "index", "expected"),
    [
        ("llama", 0, [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("gemma3", 1, [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("phi3", 1, [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]),
        ("mixtral", 0, [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["w1", "w3"], ["w2"]]),
        (
            "deepseek_v3",
            1,
            [
                ["kv_a_proj_with_mqa", "q_a_proj"],
                ["q_b_proj"],
                ["kv_b_proj"],
                ["o_proj"],
                ["gate_proj", "up_proj"],
                ["down_proj"],
                ["gate_proj", "up_proj"],
                ["down_proj"],
            ],
        ),
    ],
)
def test_layers_with_one_input_are_one_site(tiny, name, index, expected):
    _, sites = sites_of(tiny(name), index)
    assert sorted(map(leaves, sites)) == sorted(map(sorted, expected))


def test_an_experts_site_has_all_experts_and_their_rows(tiny):
    case = tiny("qwen3_moe")
    lazy, sites = sites_of(case, 1)
    site = next(site for site in sites if site.experts > 1 and len(site.row_ranges) == 2)
    assert (site.experts, site.in_features, len(site.members)) == (4, 64, 8)
    weight = site.weight(lazy.model, 0, 4)
    assert weight.shape == (4, 64, 64) and weight.dtype == torch.float32
    up = case.source.load("model.layers.1.mlp.experts.2.up_proj.weight")
    assert torch.equal(weight[2, 32:], up)


def test_targets_are_the_checkpoints_linears(tiny, arch):
    case = tiny(arch)
    selected = targets(case.lazy(), QUANT)
    assert len(set(selected.linears)) == len(selected.linears)
    every = {
        n.removesuffix(".weight") for n in case.source.names() if ".layers." in n and len(case.source.shape(n)) == 2
    }
    routers = {name for name in every if name.rpartition(".")[2] in ("gate", "shared_expert_gate")}
    assert set(selected.linears) == every - routers
    assert set(selected.untouched) == routers | {"lm_head"}
    for target in selected.selected:
        assert target.shape == case.source.shape(f"{target.linear}.weight")
    assert not case.source.reads


def test_layers_that_the_model_has_no_use_for_are_left_by_name(tiny):
    """As those that servers draft tokens with: matrices alone, and no embedding."""
    case = tiny("deepseek_v3")
    start = "model.layers.2."
    more = {
        f"{start}mlp.experts.0.gate_proj.weight": torch.zeros(64, 64),
        f"{start}eh_proj.weight": torch.zeros(64, 128),
        f"{start}shared_head.head.weight": torch.zeros(256, 64),
        f"{start}embed_tokens.weight": torch.zeros(256, 64),
        f"{start}enorm.weight": torch.zeros(64),
    }
    before = targets(case.lazy(), QUANT)
    selected = targets(case.lazy(StateDictSource(case.tensors() | more)), QUANT)
    left = (f"{start}eh_proj", f"{start}mlp.experts.0.gate_proj", f"{start}shared_head.head")
    assert selected.selected == before.selected and sorted(set(selected.untouched) - set(before.untouched)) == sorted(
        left
    )


def test_ignored_layers_are_left_with_the_pattern_that_found_them(tiny):
    case = tiny("mixtral")
    quant = QuantConfig(group_size=32, ignore=(r"layers\.0\..*k_proj$", r"experts\.3\.w1", "lm_head"))
    selected = targets(case.lazy(), quant)
    assert dict(selected.ignored) == {
        "model.layers.0.self_attn.k_proj": r"layers\.0\..*k_proj$",
        "model.layers.0.block_sparse_moe.experts.3.w1": r"experts\.3\.w1",
        "model.layers.1.block_sparse_moe.experts.3.w1": r"experts\.3\.w1",
    }
    assert set(dict(selected.ignored)) < set(selected.untouched) and not set(dict(selected.ignored)) & set(
        selected.linears
    )
    _, sites = sites_of(case, 0, quant)
    assert ["q_proj", "v_proj"] in map(leaves, sites)


@pytest.mark.parametrize("pattern", ["no_such_layer", "layers.7", "("])
def test_a_pattern_that_finds_nothing_is_an_error(tiny, pattern):
    with pytest.raises(ArgumentError, match="ignore = "):
        targets(tiny("llama").lazy(), QuantConfig(ignore=(pattern,)))


def test_ignoring_everything_is_an_error(tiny):
    with pytest.raises(ModelError, match="no Linear left"):
        targets(tiny("llama").lazy(), QuantConfig(ignore=(r"layers\.",)))


def test_a_group_size_that_does_not_fit_names_the_layer_and_what_would(tiny):
    selected = targets(tiny("llama").lazy(), QUANT)
    assert auto_group_size(selected) == 32  # 96 inputs of down_proj
    check_group_size(selected, QUANT)
    check_group_size(selected, QuantConfig(group_size=-1))
    with pytest.raises(ArgumentError, match=r"64 does not divide the 96 inputs of .*down_proj: use 32 or -1"):
        check_group_size(selected, QuantConfig(group_size=64))
    selected = targets(tiny("llama", intermediate_size=40).lazy(), QUANT)
    with pytest.raises(ArgumentError, match=r"down_proj has 40 inputs"):
        auto_group_size(selected)
    with pytest.raises(ArgumentError, match=r"down_proj: use -1"):
        check_group_size(selected, QUANT)


def test_routers_are_told_by_name_and_width(tiny):
    case = tiny("qwen2_moe")
    lazy = case.lazy()
    selected = targets(lazy, QUANT)
    gate = "model.layers.0.mlp.shared_expert_gate"  # a Linear to one number
    assert isinstance(lazy.blocks[0].mlp.shared_expert_gate, nn.Linear)
    assert gate in selected.untouched and gate not in selected.linears
    assert "model.layers.0.mlp.shared_expert.gate_proj" in selected.linears
    wide = "model.layers.0.self_attn.gate"  # the name of a router, and the width of none
    attention = lazy.blocks[0].self_attn
    attention.gate = nn.Linear(64, 48, bias=False, device="meta")
    attention.q_proj.register_forward_pre_hook(lambda module, inputs: (attention.gate(*inputs), None)[1])
    lazy.slices[f"{wide}.weight"] = (TensorSlice(f"{wide}.weight", None, 0, 0),)
    del lazy.usage  # of the model without it
    assert wide in targets(lazy, QUANT).linears


def test_a_linear_that_is_never_called_is_named(tiny):
    case = tiny("llama")
    lazy = case.lazy()
    lazy.load_outer(case.source)
    lazy.load_block(0, case.source)
    selected = targets(lazy, QUANT).of_block(0)
    mlp = lazy.blocks[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj is never called"):
        find_sites(lazy, selected, block_call(lazy, 0, torch.zeros(1, 4, 64)))


def test_a_subclass_of_linear_with_its_own_forward_is_refused(tiny):
    class Strange(nn.Linear):
        def forward(self, x):
            return super().forward(x.flip(-1))

    lazy = tiny("llama").lazy()
    lazy.blocks[1].mlp.up_proj = Strange(64, 96, bias=False)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj cannot be quantized: Strange"):
        targets(lazy, QUANT)


def test_observers_see_all_rows_and_leave_no_hooks(tiny, arch):
    case = tiny(arch)
    lazy = case.lazy()
    lazy.load_outer(case.source)
    index = len(lazy.blocks) - 1
    lazy.load_block(index, case.source)
    members = targets(lazy, QUANT).of_block(index)
    hidden = embed(lazy, case.tokens)
    sites = find_sites(lazy, members, block_call(lazy, index, hidden[:1, :8]))
    plain = call_block(lazy, index, hidden)
    rows = {}

    def note(site, x):
        assert x.shape[1] == site.in_features
        rows[site.name] = len(x)

    for site in sites:
        with observe(lazy, site, partial(note, site)):
            assert torch.equal(plain, call_block(lazy, index, hidden))
    top_k = getattr(case.model.config, "num_experts_per_tok", 1)
    assert rows == {site.name: hidden[..., 0].numel() * (top_k if site.experts > 1 else 1) for site in sites}
    assert not any(module._forward_pre_hooks for module in lazy.model.modules())

"""Our experts function is eager's, and tells exactly what every expert was given."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import use_experts_implementation

from sarqc.config import QuantConfig
from sarqc.errors import ModelError
from sarqc.method.gram import Gram
from sarqc.model import moe
from sarqc.model.layers import targets


def experts_modules(model):
    return [module for module in model.modules() if moe.is_experts(module)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_are_eagers_exactly(tiny, moe_arch, dtype):
    case = tiny(moe_arch, dtype)
    with torch.no_grad():
        expected = case.model(case.tokens).logits
        moe.use_sorted_experts(case.model)
        assert torch.equal(case.model(case.tokens).logits, expected)


def test_every_experts_inputs_are_seen_once(tiny, moe_arch):
    case = tiny(moe_arch)
    moe.use_sorted_experts(case.model)
    module = experts_modules(case.model)[-1]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(37, module.hidden_dim, generator=generator)
    index = torch.stack([torch.randperm(module.num_experts - 1, generator=generator)[:2] for _ in range(37)])
    seen = {}
    with torch.no_grad(), moe.observed(module, lambda name, x, offsets: seen.update({name: (x, offsets)})):
        module(x, index, torch.rand(37, 2, generator=generator))
    assert list(seen) == ["gate_up_proj", "down_proj"]
    rows, offsets = seen["gate_up_proj"]
    assert offsets.dtype == torch.int64 and offsets[0] == 0 and offsets[-1] == len(rows) == 37 * 2
    for expert in range(module.num_experts):
        given = rows[offsets[expert] : offsets[expert + 1]]
        expected = x[(index == expert).any(1)]
        assert len(given) == len(expected) and torch.equal(given.sort(0).values, expected.sort(0).values)
    assert offsets[-1] == offsets[-2]  # the last expert has no token
    inner, same_offsets = seen["down_proj"]
    assert torch.equal(same_offsets, offsets)
    gate, up = torch.nn.functional.linear(rows[: offsets[1]], module.gate_up_proj[0]).chunk(2, -1)
    torch.testing.assert_close(inner[: offsets[1]], module.act_fn(gate) * up)


@pytest.mark.parametrize("power", [0, 1, 2])
def test_rows_weigh_by_a_power_of_the_routers_weight(tiny, power):
    """Sums of products are those of sum_t |w_t|^p x_t x_t^T; which rows there are, and how many, is the same."""
    case = tiny("qwen3_moe")
    moe.use_sorted_experts(case.model)
    module = experts_modules(case.model)[-1]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(23, module.hidden_dim, generator=generator)
    index = torch.stack([torch.randperm(module.num_experts, generator=generator)[:2] for _ in range(23)])
    weights = torch.rand(23, 2, generator=generator) - 0.3  # some below zero
    weights[0, 0] = 0
    seen = {}

    def keep(name, rows, offsets):
        seen[name] = Gram.zeros(module.num_experts, rows.shape[1])
        seen[name].add(rows, offsets)

    with torch.no_grad(), moe.observed(module, keep, power):
        weighed = module(x, index, weights)
    with torch.no_grad():
        assert torch.equal(weighed, module(x, index, weights))
    gram = seen["gate_up_proj"]
    for expert in range(module.num_experts):
        chosen = index == expert
        rows, gates = x[chosen.any(1)], weights[chosen].abs()
        assert int(gram.rows[expert]) == len(rows)
        expected = (rows * gates[:, None] ** power).T @ rows
        torch.testing.assert_close(gram.second_moment()[expert] * len(rows), expected, rtol=1e-5, atol=1e-5)
        magnitude = (rows.abs() * gates[:, None] ** (power / 2)).sum(0)
        torch.testing.assert_close(gram.abs_sum[expert], magnitude, rtol=1e-5, atol=1e-5)


def test_the_observer_leaves_nothing_behind(tiny):
    module = experts_modules(tiny("mixtral").model)[0]
    before = set(vars(module))
    with pytest.raises(RuntimeError, match="stop"), moe.observed(module, lambda *_: None):
        raise RuntimeError("stop")
    assert set(vars(module)) == before


@use_experts_implementation(has_gate=False, has_bias=True, is_transposed=True)
class PlainExperts(nn.Module):
    """No gate, biases, stored transposed: every flag that the listed models leave alone."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = 3
        generator = torch.Generator().manual_seed(0)
        self.up_proj = nn.Parameter(torch.randn(3, 8, 12, generator=generator))
        self.up_proj_bias = nn.Parameter(torch.randn(3, 12, generator=generator))
        self.down_proj = nn.Parameter(torch.randn(3, 12, 8, generator=generator))
        self.down_proj_bias = nn.Parameter(torch.randn(3, 8, generator=generator))
        self.act_fn = torch.relu

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for expert in range(3):
            inner = self.act_fn(hidden_states @ self.up_proj[expert] + self.up_proj_bias[expert])
            outer = inner @ self.down_proj[expert] + self.down_proj_bias[expert]
            out += outer * (top_k_weights * (top_k_index == expert)).sum(1, keepdim=True)
        return out


def test_declared_flags_are_honoured():
    config = Qwen3MoeConfig()
    module = PlainExperts(config)
    generator = torch.Generator().manual_seed(2)
    x, weights = torch.randn(9, 8, generator=generator), torch.rand(9, 2, generator=generator)
    index = torch.tensor([[0, 2]] * 9)
    with torch.no_grad():
        config._experts_implementation = "eager"
        expected = module(x, index, weights)
        config._experts_implementation = moe.IMPLEMENTATION
        torch.testing.assert_close(module(x, index, weights), expected)
    reason = moe.unsupported_reason(module, per_expert_names=True)
    assert "transposed" in reason


def test_gpt_oss_is_refused_with_all_reasons_as_it_is_stored(tiny):
    """Taken apart (test_expert_names), it is quantized."""
    lazy = tiny("gpt_oss").lazy()
    with pytest.raises(ModelError, match=r"layers\.0.*transposed.*interleaved.*one tensor"):
        targets(lazy, QuantConfig(group_size=32))
    rest = targets(lazy, QuantConfig(group_size=32, ignore=(r"\.experts\.",)))
    assert {linear.rpartition(".")[2] for linear in rest.linears} == {"q_proj", "k_proj", "v_proj", "o_proj"}


class Bank(nn.Module):
    """A module of somebody's own."""

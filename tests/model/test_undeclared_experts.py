"""Experts modules that declare nothing run our function if their own code does the same; others stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.models.build import tiny_config
from sarqc.model import moe
from sarqc.model.undeclared_experts import adopt


def experts(row):
    """An experts module of a row, filled, and its kind of inputs."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    config = tiny_config(row)
    module = Llama4TextExperts(config) if row == "llama4_text" else Step3p7Experts(config.text_config, 0.5)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    count, hidden = module.num_experts, 128
    x = torch.randn(7, hidden, generator=generator)
    if row == "llama4_text":
        x = x.repeat(count, 1)
        x[torch.rand(len(x), generator=generator) < 0.5] = 0
        return module, (x,)
    weights, chosen = torch.rand(7, count, generator=generator).topk(2)
    return module, (x, chosen, weights)


@pytest.mark.parametrize("row", ["llama4_text", "step3p7"])
@torch.no_grad()
def test_an_adopted_module_computes_the_same_and_tells_what_its_experts_read(row):
    module, inputs = experts(row)
    wanted = module(*inputs)
    adopt(nn.ModuleList([module]))
    assert moe.is_experts(module) and module.is_transposed is (row == "llama4_text")
    seen = {}
    with moe.observed(module, lambda name, x, offsets: seen.update({name: (x, offsets)})):
        torch.testing.assert_close(module(*inputs), wanted, rtol=1e-4, atol=1e-4)
    assert list(seen) == ["gate_up_proj", "down_proj"]
    rows, offsets = seen["gate_up_proj"]
    assert len(rows) == offsets[-1] and rows.any(-1).all()  # no token of another expert
    if row == "llama4_text":
        per_expert = inputs[0].view(module.num_experts, 7, -1)
        for expert in range(module.num_experts):
            given = per_expert[expert][per_expert[expert].any(-1)]
            assert torch.equal(rows[offsets[expert] : offsets[expert + 1]], given)


class Scaled(nn.Module):
    """The parameters of experts with code that doubles what experts give."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 16, 6))
        self.down_proj = nn.Parameter(torch.zeros(4, 6, 8))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for token, (chosen, weights) in enumerate(zip(top_k_index, top_k_weights)):
            for expert, weight in zip(chosen, weights):
                gate, up = (self.gate_up_proj[expert] @ hidden_states[token]).chunk(2)
                out[token] += self.factor * weight * (self.down_proj[expert] @ (self.act_fn(gate) * up))
        return out


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_module_that_does_anything_else_stays_as_it_is(factor):
    module = Scaled()
    module.factor = factor
    adopt(nn.ModuleList([module]))
    assert moe.is_experts(module) is (factor == 1.0)

"""What every width would cost: fewer with each bit, and nothing where no row excites."""

from __future__ import annotations

import pytest
import torch

from sarqc.config import MethodConfig, QuantConfig
from sarqc.method.bit_allocation import loss_by_bits, probe_bits, probe_weight
from sarqc.method.gram import Statistics

QUANT = QuantConfig(group_size=32, avg_bits=4)


def site(experts=1, rows=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, 48, 64, generator=generator)
    statistics = Statistics.zeros(experts, 64, 2)
    offsets = torch.linspace(0, rows, experts + 1).long()
    for fold in range(2):
        statistics.add(torch.randn(rows, 64, generator=generator) * torch.linspace(0.1, 3, 64), offsets, fold)
    return weight, statistics


@pytest.mark.parametrize("method", ["rtn-search", "gptq", "sarqc-gptq", "sarqc-awq-gptq"])
@pytest.mark.parametrize("experts", [1, 3])
def test_each_bit_helps_by_about_four(method, experts):
    weight, statistics = site(experts)
    losses = loss_by_bits("site", weight, statistics, QUANT, MethodConfig(method), torch.bfloat16)
    assert list(losses) == list(QUANT.bit_options)
    for before, after in zip(QUANT.bit_options, QUANT.bit_options[1:]):
        assert 2.5 < (losses[before] / losses[after]) ** (1 / (after - before)) < 6


def test_what_is_tried_lies_within_the_average():
    for average, width in ((3.5, 3), (4.0, 4), (2.3, 2), (9, 8), (7.9, 6)):
        assert probe_bits(QuantConfig(avg_bits=average)) == width
    assert probe_bits(QuantConfig(avg_bits=4.1, bit_options=(5, 8))) == 5
    weight, statistics = site(2)
    result = probe_weight("site", weight, statistics, QUANT, MethodConfig(), torch.bfloat16)
    assert result.bits == 4 and float((result.dequantize() - weight).norm() / weight.norm()) < 0.2


def test_a_site_that_saw_nothing_loses_nothing():
    weight, _ = site(2)
    result = loss_by_bits("site", weight, Statistics.zeros(2, 64, 2), QUANT, MethodConfig(), torch.bfloat16)
    assert set(result) == set(QUANT.bit_options) and set(result.values()) == {0.0}

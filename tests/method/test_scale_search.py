"""Grids searched in a whole metric, against every candidate tried in float64."""

from __future__ import annotations

import pytest
import torch

from sarqc.config import QuantConfig
from sarqc.method.rtn import quantize_rtn
from sarqc.method.scale_search import minmax_error, search_scales
from sarqc_kernels.columns import fit_grid, round_to_grid
from sarqc_kernels.columns.grid import GridRule, span_factors

EXPERTS, ROWS, COLUMNS, GROUP = 2, 5, 32, 8


@pytest.fixture
def weight(generator):
    return torch.randn(EXPERTS, ROWS, COLUMNS, generator=generator)


@pytest.fixture
def hessian(generator):
    x = torch.randn(EXPERTS, 64, COLUMNS, generator=generator)
    mixed = x @ torch.randn(EXPERTS, COLUMNS, COLUMNS, generator=generator)
    return mixed.mT @ mixed / 64


def group_loss(weight, scales, zeros, hessian, bits):
    """e H_gg e^T of every group, [E, N, G], in float64."""
    codes = round_to_grid(weight, scales, zeros, bits=bits).double().unflatten(-1, (-1, GROUP))
    error = (
        weight.double().unflatten(-1, (-1, GROUP)) - (codes - zeros.double()[..., None]) * scales.double()[..., None]
    )
    groups = range(COLUMNS // GROUP)
    blocks = [hessian[:, g * GROUP : (g + 1) * GROUP, g * GROUP : (g + 1) * GROUP].double() for g in groups]
    return torch.stack([((error[:, :, g] @ blocks[g]) * error[:, :, g]).sum(-1) for g in groups], -1)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_every_group_gets_the_best_of_all_candidates(weight, hessian, bits, sym):
    rule = GridRule(bits, sym, True, torch.float32)
    scales, zeros = search_scales(weight, hessian, rule, GROUP)
    result = group_loss(weight, scales, zeros, hessian, bits)
    grouped = weight.unflatten(-1, (-1, GROUP))
    low, high = grouped.amin(-1), grouped.amax(-1)
    top = 2**bits - 1
    least = torch.full_like(result, torch.inf)
    for factor in span_factors(bits):
        if sym:
            trial, zero = torch.maximum(-low, high) * (2 * factor / top), torch.full_like(low, 2 ** (bits - 1))
            if factor != 1:
                trial = torch.where(high > -low, -trial, trial)
        else:
            trial = (high.clamp(min=0) - low.clamp(max=0)) * (factor / top)
            zero = (-factor * low.clamp(max=0) / trial).round().clamp(0, top)
        least = torch.minimum(least, group_loss(weight, trial, zero.to(torch.uint8), hessian, bits))
    torch.testing.assert_close(result, least, rtol=1e-3, atol=1e-6)


def test_a_diagonal_metric_is_the_kernels_weighted_search(weight, hessian):
    importance = hessian.diagonal(dim1=1, dim2=2).contiguous()
    scales, zeros = search_scales(weight, torch.diag_embed(importance), GridRule(3, False, True, torch.bfloat16), GROUP)
    expected = fit_grid(
        weight, importance, bits=3, group_size=GROUP, sym=False, search=True, scale_dtype=torch.bfloat16
    )
    assert torch.equal(scales, expected[0]) and torch.equal(zeros, expected[1])


def test_no_group_is_worse_than_min_max(weight, hessian):
    rule = GridRule(3, True, True, torch.bfloat16)
    result = group_loss(weight, *search_scales(weight, hessian, rule, GROUP), hessian, 3)
    plain = quantize_rtn(weight, QuantConfig(bits=3, group_size=GROUP), "minmax", torch.bfloat16)
    before = group_loss(weight, plain.scales, plain.zeros, hessian, 3)
    assert (result <= before * (1 + 1e-5)).all() and result.sum() < 0.8 * before.sum()


def test_rows_are_taken_in_portions_that_change_nothing(weight, hessian, monkeypatch):
    rule = GridRule(3, True, True, torch.bfloat16)
    whole = search_scales(weight, hessian, rule, GROUP)
    monkeypatch.setattr("sarqc.method.scale_search.ELEMENTS", 2 * EXPERTS * COLUMNS)
    parts = search_scales(weight, hessian, rule, GROUP)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


@pytest.mark.parametrize("sym", [True, False])
def test_the_error_of_plain_rounding_is_that_of_its_codes(weight, sym):
    plain = quantize_rtn(weight, QuantConfig(bits=3, group_size=GROUP, sym=sym), "minmax", torch.bfloat16)
    error = minmax_error(weight, GridRule(3, sym, False, torch.bfloat16), GROUP)
    torch.testing.assert_close(error, weight - plain.dequantize(), rtol=0, atol=1e-6)

"""Grids and plain rounding: definitions element by element, the search against brute force, hard groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sarqc_kernels import ArgumentError, fit_grid, round_to_grid
from sarqc_kernels.columns import grid
from sarqc_kernels.testing import Quantized, dequantize, poisoned_empty, random_quantized

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def options(bits: int, group_size: int, sym: bool, search: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"bits": bits, "group_size": group_size, "sym": sym, "search": search, "scale_dtype": dtype}


def loss(weight: Tensor, importance: Tensor | None, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Weighted squared error of plain rounding, fp64 [E, N, G]."""
    codes = round_to_grid(weight, scales, zeros, bits=bits)
    error = (dequantize(Quantized(codes, scales, zeros)).double() - weight.double()).square()
    if importance is not None:
        error = error * importance.double().unsqueeze(1)
    return error.unflatten(-1, (scales.shape[-1], -1)).sum(-1)


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_min_max_by_definition(bits: int, generator: torch.Generator) -> None:
    weight = torch.randn(2, 5, 24, generator=generator)
    with poisoned_empty():
        scales, zeros = fit_grid(weight, None, **options(bits, 8, True, False))
    want = weight.unflatten(-1, (3, 8)).abs().amax(-1) / ((2**bits - 1) / 2)
    torch.testing.assert_close(scales, want, rtol=1e-6, atol=0)
    assert (zeros == 1 << (bits - 1)).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_asymmetric_min_max_by_definition(bits: int, generator: torch.Generator) -> None:
    weight = torch.randn(1, 6, 24, generator=generator) + torch.tensor([0.0, 0.5, 3.0, -3.0, 1.0, -1.0])[:, None]
    scales, zeros = fit_grid(weight, None, **options(bits, 8, False, False))
    groups = weight.unflatten(-1, (3, 8))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    torch.testing.assert_close(scales, (high - low) / (2**bits - 1), rtol=1e-6, atol=0)
    assert torch.equal(zeros, (-low / scales).round().clamp(0, 2**bits - 1).to(torch.uint8))


@settings(deadline=None, max_examples=25)
@given(
    bits=st.integers(2, 8), rows=st.integers(1, 70), groups=st.integers(1, 4), group=st.integers(1, 70),
    sym=st.booleans(), dtype=st.sampled_from(DTYPES), weighted=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_the_search_is_never_worse_than_min_max(
    bits: int, rows: int, groups: int, group: int, sym: bool, dtype: torch.dtype, weighted: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, rows, groups * group, generator=generator) ** 3
    importance = torch.rand(2, groups * group, generator=generator) if weighted else None
    plain = loss(weight, importance, *fit_grid(weight, importance, **options(bits, group, sym, False, dtype)), bits)
    result = fit_grid(weight, importance, **options(bits, group, sym, True, dtype))
    assert result[0].dtype == dtype and result[0].shape == (2, rows, groups)
    # the search multiplies by 1 / scale and sums in fp32, hence the last bits
    assert (loss(weight, importance, *result, bits) <= plain * (1 + 1e-4) + 1e-30).all()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_against_forty_candidates(bits: int, sym: bool, generator: torch.Generator) -> None:
    """All factors from 1 to 0.4 in forty steps, by brute force in fp64: at most half a percent better than ours."""
    weight = torch.randn(1, 200, 128, generator=generator)
    importance = torch.randn(1, 128, generator=generator).exp()
    ours = loss(weight, importance, *fit_grid(weight, importance, **options(bits, 64, sym, True)), bits)
    least = torch.full_like(ours, float("inf"))
    scales, zeros = fit_grid(weight, importance, **options(bits, 64, sym, False))
    for step in range(40):
        least = torch.minimum(least, loss(weight, importance, scales * (1 - 0.6 * step / 39), zeros, bits))
    assert float(ours.sum()) <= 1.005 * float(least.sum())


def test_importance_decides_which_weight_is_clipped() -> None:
    """One outlier: with no importance it is clipped, with all of it the grid reaches it."""
    weight = torch.linspace(-1, 1, 64).view(1, 1, 64).clone()
    weight[..., 7] = 6.0
    importance = torch.ones(1, 64)
    for value, reached in ((0.0, False), (1e6, True)):
        importance[0, 7] = value
        scales, zeros = fit_grid(weight, importance, **options(4, 64, True, True))
        codes = round_to_grid(weight, scales, zeros, bits=4)
        error = (dequantize(Quantized(codes, scales, zeros)) - weight)[0, 0, 7].abs()
        assert (float(error) < 0.1) == reached


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searched_symmetric_grids_turn_to_the_side_of_the_largest_weight(bits: int, generator: torch.Generator) -> None:
    """The mirrored weight gets the mirrored grid, and what is lost has no direction."""
    weight = torch.randn(1, 500, 128, generator=generator)
    scales, zeros = fit_grid(weight, None, **options(bits, 32, True, True))
    mirrored, _ = fit_grid(-weight, None, **options(bits, 32, True, True))
    groups = weight.unflatten(-1, (-1, 32))
    upward = groups.amax(-1) > -groups.amin(-1)
    negated = scales < 0
    assert not negated[~upward].any() and negated[upward].float().mean() > 0.99  # the rest kept the min-max grid itself
    both = negated == (mirrored > 0)
    assert torch.equal(scales[both], -mirrored[both]) and both.float().mean() > 0.99

    def direction(grid: tuple[Tensor, Tensor]) -> float:
        """The mean error as a part of the mean size of errors."""
        error = dequantize(Quantized(round_to_grid(weight, *grid, bits=bits), *grid)) - weight
        return abs(float(error.mean() / error.abs().mean()))

    plain = fit_grid(weight, None, **options(bits, 32, True, False))
    assert (plain[0] > 0).all()
    assert direction((scales, zeros)) < 0.02 < direction((scales.abs(), zeros))


def test_no_importance_is_all_ones(generator: torch.Generator) -> None:
    weight = torch.randn(1, 30, 64, generator=generator)
    plain, ones = (fit_grid(weight, i, **options(3, 32, False, True)) for i in (None, torch.ones(1, 64)))
    assert all(torch.equal(a, b) for a, b in zip(plain, ones))


@pytest.mark.parametrize("rows", [(1, 2, 3), (17, 64, 1), (300, 70, 2100)], ids=str)
def test_rows_and_experts_do_not_influence_each_other(rows: tuple[int, ...], generator: torch.Generator) -> None:
    parts = [torch.randn(1, n, 64, generator=generator) for n in rows]
    importance = torch.rand(1, 64, generator=generator)
    together = fit_grid(torch.cat(parts, 1), importance, **options(4, 32, True, True))
    for part, scales, zeros in zip(parts, together[0].split(rows, 1), together[1].split(rows, 1)):
        alone = fit_grid(part, importance, **options(4, 32, True, True))
        assert torch.equal(alone[0], scales) and torch.equal(alone[1], zeros)
    pair = fit_grid(torch.cat([parts[0], -parts[0]]), importance.expand(2, -1), **options(4, 32, False, True))
    alone = fit_grid(-parts[0], importance, **options(4, 32, False, True))
    assert torch.equal(alone[0][0], pair[0][1]) and torch.equal(alone[1][0], pair[1][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("sym", [True, False])
def test_hard_groups(sym: bool, search: bool, dtype: torch.dtype) -> None:
    """Zeros are exact, a constant is close, what underflows the scale's dtype or overflows it stays finite."""
    rows = torch.tensor([0.0, 0.25, -0.25, 1e-12, 1e-42, 3e38, -1e7])
    weight = rows.view(1, -1, 1).repeat(1, 1, 16)
    scales, zeros = fit_grid(weight, torch.ones(1, 16), **options(4, 16, sym, search, dtype))
    assert scales.dtype == dtype and scales.isfinite().all()
    assert (scales.float().abs() >= torch.finfo(dtype).tiny).all()
    codes = round_to_grid(weight, scales, zeros, bits=4)
    values = dequantize(Quantized(codes, scales, zeros))[0]
    assert values.isfinite().all() and not values[0].any()
    assert ((values[:5] - weight[0, :5]).abs() <= scales[0, :5].float().abs()).all()


def test_codes_round_half_to_even_and_clamp() -> None:
    weight = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 100.0, -100.0, float("inf")]).view(1, 1, 8)
    codes = round_to_grid(weight, torch.ones(1, 1, 1), torch.full((1, 1, 1), 8, dtype=torch.uint8), bits=4)
    assert codes.flatten().tolist() == [8, 10, 10, 8, 6, 15, 0, 15]


def test_a_scale_of_zero_is_safe() -> None:
    weight = torch.tensor([0.0, 1.0, -1.0, 5.0]).view(1, 1, 4)
    zeros = torch.full((1, 1, 1), 2, dtype=torch.uint8)
    codes = round_to_grid(weight, torch.zeros(1, 1, 1), zeros, bits=3)
    assert codes.max() < 8 and not dequantize(Quantized(codes, torch.zeros(1, 1, 1), zeros)).any()


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_on_the_grid_come_back(bits: int, generator: torch.Generator) -> None:
    weight = random_quantized(generator, (2, 33, 60), 4, bits, sym=False)
    with poisoned_empty():
        codes = round_to_grid(dequantize(weight), weight.scales, weight.zeros, bits=bits)
    assert torch.equal(codes, weight.codes)


@pytest.mark.parametrize("tile", [1, 1 << 30])
def test_tiles_change_nothing(tile: int, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    weight = torch.randn(2, 150, 48, generator=generator)
    want = fit_grid(weight, None, **options(4, 16, False, True))
    codes = round_to_grid(weight, *want, bits=4)
    monkeypatch.setattr(grid, "TILE_ELEMENTS", tile)
    again = fit_grid(weight, None, **options(4, 16, False, True))
    assert all(torch.equal(a, b) for a, b in zip(want, again))
    assert torch.equal(round_to_grid(weight, *want, bits=4), codes)


def test_factors_begin_with_min_max() -> None:
    for bits in range(2, 9):
        factors = grid.span_factors(bits)
        assert factors[0] == 1 and len(factors) == grid.TRIALS
        assert max(factors) == grid.WIDEST and 0.39 < min(factors) < 0.71


def test_refuses_what_does_not_fit() -> None:
    weight, scales = torch.zeros(1, 2, 12), torch.ones(1, 2, 3)
    zeros = scales.to(torch.uint8)
    for broken, words in (
        (lambda: fit_grid(weight.half(), None, **options(4, 4, True, True)), "weight is torch.float16"),
        (lambda: fit_grid(weight[0], None, **options(4, 4, True, True)), "one expert for a dense layer"),
        (lambda: fit_grid(weight, torch.ones(1, 11), **options(4, 4, True, True)), "importance is"),
        (lambda: fit_grid(weight, None, **options(4, 5, True, True)), "group_size = 5 does not divide 12"),
        (lambda: fit_grid(weight, None, **options(4, -1, True, True)), "12 for one group per row"),
        (lambda: fit_grid(weight, None, **options(9, 4, True, True)), "bits = 9"),
        (lambda: fit_grid(weight, None, **options(4, 4, True, True, torch.float64)), "scale_dtype = torch.float64"),
        (lambda: round_to_grid(weight, scales[..., :1].expand(1, 2, 5), zeros, bits=4), "scales is"),
        (lambda: round_to_grid(weight, scales, zeros.int(), bits=4), "zeros is torch.int32"),
        (lambda: round_to_grid(weight, scales, zeros.to("meta"), bits=4), "zeros is on meta"),
    ):
        with pytest.raises(ArgumentError, match=words):
            broken()


def test_opcheck(generator: torch.Generator) -> None:
    weight = torch.randn(2, 3, 12, generator=generator)
    torch.library.opcheck(torch.ops.sarqc.fit_grid.default, (weight, None, 4, 4, True, True, torch.float16))
    importance = torch.ones(2, 12)
    torch.library.opcheck(torch.ops.sarqc.fit_grid.default, (weight, importance, 3, 6, False, False, torch.float32))
    scales, zeros = fit_grid(weight, None, **options(4, 4, True, True))
    torch.library.opcheck(torch.ops.sarqc.round_to_grid.default, (weight, scales, zeros, 4))

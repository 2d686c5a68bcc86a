"""Shapes, group sizes and dtypes that nobody thought of: drawn by Hypothesis, the same ones on every run.

All are held to float64, and plain rounding to the reference. In the interpreter an example costs most of a second, so
there are few and small; on a GPU there are many and larger. They stand apart from the tests that a benchmark runs
first, which need nothing but pytest.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sarqc_kernels import fit_grid, gram_accumulate_, quantize_columns, round_to_grid, w4a16_matmul
from sarqc_kernels.testing import (
    poisoned_empty,
    product_bound,
    random_gram,
    random_quantized,
    uneven_offsets,
    upper_factor,
)
from sarqc_kernels.w4a16 import repack
from tests.kernels.columns_cases import Case, assert_recurrence
from tests.kernels.conftest import DEVICE, unsupported_reason
from tests.kernels.test_columns import group_order, options
from tests.kernels.test_w4a16 import check as check_product

ON_GPU = DEVICE == "cuda"
MOST = 4 if ON_GPU else 1  # times larger on a GPU
DRAWN = settings(
    derandomize=True, deadline=None, database=None, max_examples=150 if ON_GPU else 6,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
needs_triton = pytest.mark.skipif(bool(unsupported_reason("triton")), reason=str(unsupported_reason("triton")))


@needs_triton
@DRAWN
@given(
    experts=st.integers(1, 3), tokens=st.integers(0, 90 * MOST), inputs=st.integers(1, 70 * MOST),
    dtype=st.sampled_from(DTYPES), extra=st.sampled_from([0, 3, 16]), calls=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_gram(experts, tokens, inputs, dtype, extra, calls, seed):
    """Sums of one or two calls, from a view into wider rows, against float64 within the bound of any fp32 sum."""
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(experts, inputs, inputs), torch.zeros(experts, dtype=torch.int64), torch.zeros(experts, inputs)
    ours = [part.to(DEVICE) for part in sums]
    exact, counted = torch.zeros_like(sums[0]).double(), torch.zeros_like(sums[1])
    slack = torch.zeros_like(exact)
    for _ in range(calls):
        wide = torch.randn(tokens, inputs + extra, generator=generator).to(dtype)
        x, offsets = wide[:, extra:], uneven_offsets(generator, tokens, experts)
        gram_accumulate_(*ours, wide.to(DEVICE)[:, extra:], offsets.to(DEVICE), backend="triton")
        for expert in range(experts):
            rows = x[offsets[expert] : offsets[expert + 1]].double()
            exact[expert] += rows.T @ rows
            # one more unit in the last place for adding the call's sum; fp32 is multiplied by halves (16 eps a product)
            bound = product_bound(rows.T, rows) + 17 * 2.0**-23 * (rows.abs().T @ rows.abs())
            slack = slack + torch.zeros_like(exact).index_add_(0, torch.tensor([expert]), bound[None])
        counted += offsets.diff()
    assert torch.equal(ours[1].cpu(), counted)
    assert ((ours[0].cpu().double() - exact).abs().tril() <= slack + 1e-30).all()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A problem for the column solver; groups narrower and wider than a panel, given grids and fitted ones."""
    group_size = draw(st.sampled_from([1, 5, 16, 30] if not ON_GPU else [1, 5, 16, 32, 64, 128, 130, 200]))
    given_grid = draw(st.booleans())
    return Case(
        experts=draw(st.integers(1, 2)),
        rows=draw(st.integers(1, 36 * MOST)),
        columns=group_size * draw(st.integers(1, max(1, 33 * MOST // group_size))),
        group_size=group_size,
        bits=draw(st.integers(2, 8)),
        sym=draw(st.booleans()),
        given=given_grid,
        order=draw(st.sampled_from(["none", "any" if given_grid else "group"])),
        dtype=draw(st.sampled_from(DTYPES)),
    )


def drawn_problem(case: Case, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(case.experts, case.rows, case.columns, generator=generator)
    hessian = random_gram(generator, case.experts, case.columns)
    order = case.processing_order(generator)
    if order is not None:
        hessian = torch.stack([matrix[own][:, own] for matrix, own in zip(hessian, order)])
    return weight, hessian, order


@needs_triton
@DRAWN
@given(case=cases(), seed=st.integers(0, 2**31))
def test_columns_like_the_recurrence_in_fp64(case, seed):
    weight, hessian, order = drawn_problem(case, seed)
    factor = upper_factor(hessian)
    grid = fit_grid(weight, None, **case.rule) if case.given else (None, None)
    moved = [each if each is None else each.to(DEVICE) for each in (weight, factor.float(), order, *grid)]
    got = tuple(part.cpu() for part in quantize_columns(*moved, **case.rule, backend="triton"))
    assert got[1].dtype == case.dtype and got[2].dtype == torch.uint8
    assert not case.given or all(torch.equal(ours, theirs) for ours, theirs in zip(got[1:], grid))
    assert_recurrence(case, (weight, factor, order), got)


@settings(DRAWN, max_examples=40)
@given(case=cases(), seed=st.integers(0, 2**31))
def test_the_reference_like_the_recurrence_in_fp64(case, seed):
    weight, hessian, order = drawn_problem(case, seed)
    factor = upper_factor(hessian)
    grid = fit_grid(weight, None, **case.rule) if case.given else (None, None)
    result = quantize_columns(weight, factor.float(), order, *grid, **case.rule, backend="reference")
    assert_recurrence(case, (weight, factor, order), result)


@needs_triton
@DRAWN
@given(case=cases(), seed=st.integers(0, 2**31))
def test_grids_and_rounding_like_the_reference(case, seed):
    weight = drawn_problem(case, seed)[0] * 10.0 ** (seed % 7 - 3)
    want = fit_grid(weight, None, **case.rule, backend="reference")
    got = [part.cpu() for part in fit_grid(weight.to(DEVICE), None, **case.rule, backend="triton")]
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    codes = round_to_grid(weight.to(DEVICE), *(part.to(DEVICE) for part in want), bits=case.bits, backend="triton")
    assert torch.equal(codes.cpu(), round_to_grid(weight, *want, bits=case.bits, backend="reference"))


@settings(DRAWN, max_examples=12)
@given(
    experts=st.integers(1, 3), rows=st.integers(0, 20), groups=st.integers(1, 4), size=st.integers(1, 150),
    bits=st.integers(2, 8), sym=st.booleans(), search=st.booleans(), given=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_shapes_of_columns(
    experts: int, rows: int, groups: int, size: int, bits: int, sym: bool, search: bool, given: bool, seed: int
) -> None:
    """Any shape runs, leaves nothing unwritten, keeps its dtypes, and does not touch its arguments."""
    generator = torch.Generator().manual_seed(seed)
    columns = groups * size
    weight = torch.randn(experts, rows, columns, generator=generator)
    factor = torch.eye(columns) + 0.01 * torch.randn(experts, columns, columns, generator=generator).triu(1)
    rule = options(bits, size, sym, search)
    grid = fit_grid(weight, None, **rule) if given else (None, None)
    order = group_order(generator, experts, columns, size)
    kept = [t.clone() for t in (weight, factor, order)]
    with poisoned_empty():
        codes, scales, zeros = quantize_columns(weight, factor, order, *grid, **rule)
    assert codes.shape == weight.shape and codes.dtype == zeros.dtype == torch.uint8
    assert scales.shape == zeros.shape == (experts, rows, groups) and scales.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(kept, (weight, factor, order)))
    if rows:
        assert int(codes.max()) < 1 << bits and int(zeros.max()) < 1 << bits
        assert not sym or given or (zeros == 1 << (bits - 1)).all()


@settings(DRAWN, max_examples=25)
@given(
    bits=st.integers(2, 8), tokens=st.integers(0, 20), rows=st.integers(1, 40), groups=st.integers(1, 5),
    group=st.integers(1, 40), experts=st.integers(1, 4), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_every_width_and_shape_of_w4a16_by_the_reference(
    bits: int, tokens: int, rows: int, groups: int, group: int, experts: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = random_quantized(generator, (experts, rows, groups * group), groups, bits, sym=False)
    x = torch.randn(tokens, groups * group, generator=generator).to(dtype)
    bias = torch.randn(experts, rows, generator=generator)
    offsets = uneven_offsets(generator, tokens, experts)
    ready = repack(weight.codes, weight.scales, weight.zeros, bits=bits)
    out = w4a16_matmul(x, ready, offsets, bias, backend="reference")
    assert out.shape == (tokens, rows) and out.dtype == dtype
    assert ready.layout == "stream"
    check_product(out, x, weight, offsets, bias, "reference")

"""`grid.py` in Triton: the scale and zero of a group, for programs in which every row has a thread of its own.

The group is what a free pass of `_columns` left (see `panels.py`), weight - delta, or the weight itself (`fit_impl`).
It is read once for its range and once for every trial of the search, from the first-level cache; a trial costs about 8
flops per weight. Steps are those of `grid.fit_tile`, so a grid differs from the reference's only where the sums of two
trials are equal but for the order in which they were taken.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# (Triton's kernels take no annotations but tl.constexpr.)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["clamped", "fit", "fit_wide", "half_even"]


@triton.jit
def half_even(value):
    """Nearest whole number, ties to even, for |value| < 2^22; beyond it stays beyond 2^21, whatever the clamp is.

    1.5 * 2^23 leaves no bits for a fraction. Two additions, where the rounding instruction has a quarter of their rate;
    and the interpreter knows no other way.
    """
    return (value + 12582912.0) - 12582912.0


@triton.jit
def clamped(value, low, high):
    """`value`, but not below `low` and not above `high`."""
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def _group(data, begin, end, lanes, MOVED: tl.constexpr, CHUNK: tl.constexpr):
    """Columns begin .. of a group, compensated as a free pass left it or (not MOVED) as it is: ([CHUNK, rows], which
    columns are its own)."""
    weight, delta, _, _ = data
    row, live, rows = lanes
    j = begin + tl.arange(0, CHUNK)
    inside = (j < end)[:, None]
    at, mask = j[:, None] * rows + row[None, :], inside & live[None, :]
    value = tl.load(weight + at, mask=mask, other=0.0)
    if MOVED:
        value -= tl.load(delta + at, mask=mask, other=0.0)
    return value, inside


@triton.jit
def fit(
    data, begin, end, lanes, limits, SYM: tl.constexpr, SEARCH: tl.constexpr, SCALE: tl.constexpr,
    TRIALS: tl.constexpr, MOVED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scale and zero [rows] of the group begin .. end - 1; `grid.fit_tile` says what and why.

    data: (weight, delta, importance, table). lanes: (row, which rows there are, rows). limits: (top, middle, tiny,
    most).
    """
    table = data[3]
    low = tl.full((CHUNK, ROWS), float("inf"), tl.float32)
    high = tl.full((CHUNK, ROWS), float("-inf"), tl.float32)
    for j in range(begin, end, CHUNK):
        value, inside = _group(data, j, end, lanes, MOVED, CHUNK)
        low = tl.minimum(low, tl.where(inside, value, float("inf")))
        high = tl.maximum(high, tl.where(inside, value, float("-inf")))
    low, high = tl.min(low, 0), tl.max(high, 0)
    if SYM:
        span = tl.maximum(-low, high)
    else:
        low = tl.minimum(low, 0.0)
        span = tl.maximum(high, 0.0) - low
    scale, zero = _grid(span, low, table, limits, SYM, SCALE)
    if SEARCH:
        if SYM:
            span = tl.where(high > -low, -span, span)
        least = _loss(data, scale, zero, begin, end, lanes, limits[0], MOVED, ROWS, CHUNK)
        for trial in range(1, TRIALS):
            other, other_zero = _grid(span, low, table + 2 * trial, limits, SYM, SCALE)
            loss = _loss(data, other, other_zero, begin, end, lanes, limits[0], MOVED, ROWS, CHUNK)
            better = loss < least
            least = tl.where(better, loss, least)
            scale = tl.where(better, other, scale)
            zero = tl.where(better, other_zero, zero)
    return scale, zero


@triton.jit
def _grid(span, low, pair, limits, SYM: tl.constexpr, SCALE: tl.constexpr):
    """The grid that covers a multiple of a span; pair: what gives the scale, and minus the multiple."""
    top, middle, tiny, most = limits
    scale = clamped(tl.abs(span) * tl.load(pair), tiny, most).to(SCALE).to(tl.float32)
    if SYM:
        scale = tl.where(span < 0.0, -scale, scale)
        zero = tl.zeros_like(span) + middle
    else:
        zero = clamped(half_even(tl.div_rn(low * tl.load(pair + 1), scale)), 0.0, top)
    return scale, zero


@triton.jit
def _loss(data, scale, zero, begin, end, lanes, top, MOVED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Weighted squared rounding error [rows] of the group on a grid."""
    total = tl.zeros((CHUNK, ROWS), dtype=tl.float32)
    per_scale = tl.div_rn(1.0, scale)[None, :]
    least, most = -zero[None, :], (top - zero)[None, :]
    for j in range(begin, end, CHUNK):
        value, _ = _group(data, j, end, lanes, MOVED, CHUNK)
        steps = value * per_scale
        error = clamped(half_even(steps), least, most) - steps
        at = j + tl.arange(0, CHUNK)
        count = tl.load(data[2] + at, mask=at < end, other=0.0)[:, None]
        total = tl.fma(error * count, error, total)
    return tl.sum(total, 0) * scale * scale


@triton.jit
def fit_wide(
    weight, delta, importance, group_of, scales, zeros, table, first, last, rows, columns, groups,
    top, middle, tiny, most, SYM: tl.constexpr, SEARCH: tl.constexpr, SCALE: tl.constexpr, TRIALS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The grid of the group that columns first .. last - 1 are."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    matrix, vector = expert * columns * rows, expert * columns
    data = (weight + matrix, delta + matrix, importance + vector, table)
    scale, zero = fit(data, first, last, (row, live, rows), (top, middle, tiny, most), SYM, SEARCH, SCALE, TRIALS, True,
                      ROWS, CHUNK)  # fmt: skip
    at = (expert * groups + tl.load(group_of + vector + first)) * rows + row
    tl.store(scales + at, scale, mask=live)
    tl.store(zeros + at, zero, mask=live)

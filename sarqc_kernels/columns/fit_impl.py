"""`fit_grid` and `round_to_grid` in Triton: grids and codes of a weight as it is, with no feedback between columns.

The fit is that of `grid_impl.py`, a row to a thread, over the weight transposed (one copy of it): a group is read once
for its range and, with a search, once for each of 24 trials, from cache. Rounding reads 4 bytes a weight, writes one.
Rounding and clamping are the reference's to the bit, so `round_to_grid` gives its very codes. A searched scale can be
the neighbour of the reference's where the losses of two trials are equal but for the order of their sums.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# (Triton's kernels take no annotations but tl.constexpr.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sarqc_kernels.columns.config import rule
from sarqc_kernels.columns.grid import GridRule, empty_grid
from sarqc_kernels.columns.grid_impl import clamped, fit, half_even
from sarqc_kernels.columns.panels import batches, factors_of
from sarqc_kernels.columns.triton_impl import CHUNK, OPTIONS, kind_of, limits
from sarqc_kernels.device import device_info, on_device

__all__ = ["fit_grid", "round_to_grid"]

LINES, WIDTH = 16, 128  # of a program of `_round`


@triton.jit
def _fit_groups(
    weight, importance, scales, zeros, table, rows, columns, group_size, top, middle, tiny, most,
    SYM: tl.constexpr, SEARCH: tl.constexpr, SCALE: tl.constexpr, TRIALS: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """scales, zeros [E, G, N] of weight [E, K, N] with importance [E, K]; programs (rows, expert, group)."""
    expert, group = tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    own, begin = weight + expert * columns * rows, group * group_size
    data = (own, own, importance + expert * columns, table)
    scale, zero = fit(data, begin, begin + group_size, (row, live, rows), (top, middle, tiny, most), SYM, SEARCH, SCALE,
                      TRIALS, False, ROWS, CHUNK)  # fmt: skip
    at = (expert * tl.num_programs(2) + group) * rows + row
    tl.store(scales + at, scale, mask=live)
    tl.store(zeros + at, zero, mask=live)


@triton.jit
def _round(
    weight, scales, zeros, codes, lines, columns, groups, group_size, top, LINES: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Codes of weight [lines, columns] on the grid [lines, groups]."""
    line = (tl.program_id(0) * LINES + tl.arange(0, LINES))[:, None].to(tl.int64)
    column = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    mask = (line < lines) & (column < columns)
    spot = line * groups + column // group_size
    scale = tl.load(scales + spot, mask=mask, other=1.0).to(tl.float32)
    scale = tl.where(scale == 0.0, 1.0, scale)
    zero = tl.load(zeros + spot, mask=mask, other=0).to(tl.float32)
    value = tl.load(weight + line * columns + column, mask=mask, other=0.0)
    level = clamped(half_even(tl.div_rn(value, scale)), -zero, top - zero)
    tl.store(codes + line * columns + column, (level + zero).to(tl.int32).to(tl.uint8), mask=mask)


def fit_grid(weight: Tensor, importance: Tensor | None, group_size: int, wanted: GridRule) -> tuple[Tensor, Tensor]:
    """`sarqc_kernels.columns.fit_grid` in Triton; does not wait for the device."""
    scales, zeros = empty_grid(weight, group_size, wanted)
    if not weight.numel():
        return scales, zeros
    (experts, rows, columns), groups = weight.shape, scales.shape[2]
    counts = torch.ones((experts, columns), device=weight.device) if importance is None else importance.contiguous()
    table = factors_of(wanted.bits, wanted.sym, weight.device)
    own = rule(experts * groups, rows, device_info(weight.device))
    with on_device(weight):
        for some, span in batches(experts, rows, columns):
            part = weight[some, span].mT.contiguous()
            grid = part.new_empty((2, len(part), groups, part.shape[2]))
            _fit_groups[(-(-part.shape[2] // own.rows), len(part), groups)](
                part, counts[some], grid[0], grid[1], table, part.shape[2], columns, group_size, **limits(wanted),
                **kind_of(wanted), ROWS=own.rows, CHUNK=CHUNK, num_warps=own.warps, **OPTIONS,
            )  # fmt: skip
            scales[some, span] = grid[0].mT.to(wanted.scale_dtype)
            zeros[some, span] = grid[1].mT.to(torch.uint8)
    return scales, zeros


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """`sarqc_kernels.columns.round_to_grid` in Triton; does not wait for the device."""
    experts, rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    if weight.numel():
        lines, groups = experts * rows, scales.shape[2]
        with on_device(weight):
            _round[(-(-lines // LINES), -(-columns // WIDTH))](
                weight.contiguous(), scales.contiguous(), zeros.contiguous(), codes, lines, columns, groups,
                columns // groups, float((1 << bits) - 1), LINES=LINES, WIDTH=WIDTH, num_warps=4, **OPTIONS,
            )  # fmt: skip
    return codes

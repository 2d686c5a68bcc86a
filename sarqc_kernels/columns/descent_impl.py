"""`coordinate_descent` in Triton: one launch for all groups and passes.

Rows are independent, so a program takes ROWS of them through every group of every pass without waiting. Buffers
are those of `panels.py`, [E, K, N] with a column of all rows contiguous. For each group:

    codes     the columns in turn, by `triton_impl._advance`: with the weights as they are where the solver has W,
              (E H)_g where it has its sums and H_gg where it has M, its recurrence is q_j + (E H)_j / H_jj
    products  (E H)_g after the codes changed, and L H_gg, tile by tile; what the scale needs is summed on the way
    choice    the new scale, and whether the row takes codes and scale
    update    E H -= D H_g for all K columns, a product of depth g

Bytes and flops of a pass over N rows: 2 N K^2 flops on tensor cores (three times that in TF32), K^2 words of H for each
program (from the L2 cache), 8 N K / g words of E H from memory (twice what an update of whole passes would be; it stays
in the L2 cache for 32 MB and less).

What threads of a program read of each other goes through memory with a barrier between.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# (Triton's kernels take no annotations but tl.constexpr.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sarqc_kernels.columns.config import MICRO
from sarqc_kernels.columns.descent_reference import REACH
from sarqc_kernels.columns.panels import batches
from sarqc_kernels.columns.triton_impl import DEPTH, OPTIONS, SCALES, _add_pull, _advance
from sarqc_kernels.device import Device, device_info, on_device

__all__ = ["coordinate_descent"]

ROWS = 32
"""Of a program. In the chain of columns, where a row has one thread, all warps do the same."""

TILE = 64
"""Columns of a product that a program takes at once."""


@triton.jit
def _level_product(
    acc, factor, codes, zero, end, column, live_column, row, live_row, rows, stride, DEPTH: tl.constexpr
):
    """acc [columns, rows] + sum over i < end of H[i, column] (code[i, row] - zero[row])."""
    line, within = factor, tl.arange(0, DEPTH)[:, None] * stride + column[None, :]
    for start in range(0, end, DEPTH):
        i = start + tl.arange(0, DEPTH)
        live = (i < end)[:, None]
        m = tl.load(line + within, mask=live & live_column[None, :], other=0.0)
        code = tl.load(codes + i[:, None] * rows + row[None, :], mask=live & live_row[None, :], other=0)
        level = tl.where(live, code.to(tl.float32) - zero[None, :], 0.0)
        acc = tl.dot(tl.trans(m), level, acc, input_precision="tf32x3")
        line += DEPTH * stride
    return acc


@triton.jit
def _choose(
    data, scale, zero, size, lanes, SCALE: tl.constexpr, REACH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr
):
    """The new scale of a group, codes and weights of the rows that take it, and the change of their weights."""
    values, codes, best, scale_at, gradient, rest, curved, change = data
    row, live, rows = lanes
    over = tl.zeros((CHUNK, ROWS), dtype=tl.float32)
    under = tl.zeros((CHUNK, ROWS), dtype=tl.float32)
    for first in range(0, size, CHUNK):
        j = first + tl.arange(0, CHUNK)
        at, mask = j[:, None] * rows + row[None, :], (j < size)[:, None] & live[None, :]
        level = tl.load(best + at, mask=mask, other=0).to(tl.float32) - tl.where(mask, zero[None, :], 0.0)
        over += level * tl.load(rest + at, mask=mask, other=0.0)
        under += level * tl.load(curved + at, mask=mask, other=0.0)
    wanted = (scale + tl.div_rn(tl.sum(over, 0), tl.sum(under, 0))).to(SCALE).to(tl.float32)
    growth = tl.div_rn(wanted, scale)
    new = tl.where((growth > 1.0 / REACH) & (growth < REACH), wanted, scale)
    saved = tl.zeros((CHUNK, ROWS), dtype=tl.float32)
    for first in range(0, size, CHUNK):
        j = first + tl.arange(0, CHUNK)
        at, mask = j[:, None] * rows + row[None, :], (j < size)[:, None] & live[None, :]
        level = tl.load(best + at, mask=mask, other=0).to(tl.float32) - tl.where(mask, zero[None, :], 0.0)
        moved = level * new[None, :] - tl.load(values + at, mask=mask, other=0.0)
        bend = (new - scale)[None, :] * tl.load(curved + at, mask=mask, other=0.0)
        pull = tl.load(gradient + at, mask=mask, other=0.0) + tl.load(rest + at, mask=mask, other=0.0)
        saved += moved * (pull - bend)
    better = tl.sum(saved, 0) > 0.0
    tl.store(scale_at + row, tl.where(better, new, scale), mask=live)
    for first in range(0, size, CHUNK):
        j = first + tl.arange(0, CHUNK)
        at, mask = j[:, None] * rows + row[None, :], (j < size)[:, None] & live[None, :]
        code = tl.load(best + at, mask=mask, other=0)
        before = tl.load(values + at, mask=mask, other=0.0)
        after = (code.to(tl.float32) - zero[None, :]) * new[None, :]
        takes = mask & better[None, :]
        tl.store(values + at, after, mask=takes)
        tl.store(codes + at, code, mask=takes)
        tl.store(change + at, tl.where(better[None, :], before - after, 0.0), mask=mask)


@triton.jit
def _descend(
    values, codes, gradient, hessian, usable, inverse, scales, zeros, ahead, change, rest, curved, best, group_of,
    rows, columns, groups, size, passes, hessian_expert, top, SCALE: tl.constexpr, REACH: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, MICRO: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """All groups of all passes for ROWS rows of one expert."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    if tl.load(usable + expert) != 0:
        hessian += expert * hessian_expert
        matrix, part = expert * columns * rows, expert * size * rows
        values, codes, gradient = values + matrix, codes + matrix, gradient + matrix
        change, rest, curved, best = change + part, rest + part, curved + part, best + part
        scales, zeros = scales + expert * groups * rows, zeros + expert * groups * rows
        inverse, ahead = inverse + expert * columns, ahead + expert * MICRO * rows
        for step in range(0, passes * groups):
            group = step % groups
            first = group * size
            square = hessian + tl.cast(first, tl.int64) * (columns + 1)
            scale = tl.load(scales + group * rows + row, mask=live, other=1.0)
            zero = tl.load(zeros + group * rows + row, mask=live, other=0.0)
            own = first * rows
            panel = (values + own, change, best, ahead, square, inverse + first, group_of, scales + group * rows,
                     zeros + group * rows)  # fmt: skip
            _advance(panel, gradient + own, (row, live, True, rows, columns, top), 0, size, True, MICRO, DEPTH)
            for tile in range(0, size, TILE):
                j = tile + tl.arange(0, TILE)
                at, mask = j[:, None] * rows + row[None, :], (j < size)[:, None] & live[None, :]
                acc = tl.load(gradient + own + at, mask=mask, other=0.0)
                acc = _add_pull(acc, square, change, 0, size, j, j < size, row, live, rows, columns, DEPTH)
                tl.store(rest + at, acc, mask=mask)
                acc = tl.zeros((TILE, ROWS), dtype=tl.float32)
                acc = _level_product(acc, square, best, zero, size, j, j < size, row, live, rows, columns, DEPTH)
                tl.store(curved + at, acc, mask=mask)
            tl.debug_barrier()
            data = (
                values + own,
                codes + own,
                best,
                scales + group * rows,
                gradient + own,
                rest,
                curved,
                change,
            )
            _choose(data, scale, zero, size, (row, live, rows), SCALE, REACH, MICRO, ROWS)
            tl.debug_barrier()
            line = hessian + tl.cast(first, tl.int64) * columns
            for tile in range(0, columns, TILE):  # `change` holds before - after, as the errors of the columns do
                j = tile + tl.arange(0, TILE)
                at, mask = j[:, None] * rows + row[None, :], (j < columns)[:, None] & live[None, :]
                acc = tl.load(gradient + at, mask=mask, other=0.0)
                acc = _add_pull(acc, line, change, 0, size, j, j < columns, row, live, rows, columns, DEPTH)
                tl.store(gradient + at, acc, mask=mask)
            tl.debug_barrier()


def coordinate_descent(
    weight: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, hessian: Tensor, bits: int, passes: int
) -> tuple[Tensor, Tensor]:
    """`sarqc_kernels.columns.coordinate_descent` in Triton; does not wait for the device."""
    experts, rows, columns = weight.shape
    found_codes, found_scales = codes.clone(), scales.clone()
    with on_device(weight):
        for some, span in batches(experts, rows, columns):
            at = (some, span)
            _batch(weight[at], found_codes[at], found_scales[at], zeros[at], hessian[some].contiguous(), bits, passes)
    return found_codes, found_scales


def _warps(card: Device) -> int:
    """What the products need; where they keep their sums in registers, four warps of sm_120 spill."""
    return 8 if card.sums_in_registers else 4


def _batch(
    weight: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, hessian: Tensor, bits: int, passes: int
) -> None:
    """`codes` and `scales` of some rows of some experts, in place."""
    (experts, rows, columns), groups = weight.shape, scales.shape[2]
    size = columns // groups
    own, scale, zero = codes.mT.contiguous(), scales.float().mT.contiguous(), zeros.float().mT.contiguous()
    values = (own.float() - zero.repeat_interleave(size, 1)) * scale.repeat_interleave(size, 1)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    usable = (diagonal.isfinite() & (diagonal > 0)).all(1)
    gradient = torch.bmm(hessian, weight.mT - values)
    scratch = values.new_empty((3, experts, size, rows))
    _descend[(-(-rows // ROWS), experts)](
        values, own, gradient, hessian, usable.int(), torch.where(usable[:, None], diagonal, 1.0).reciprocal(), scale,
        zero, values.new_empty((experts, MICRO, rows)), *scratch.unbind(0), best=own.new_empty((experts, size, rows)),
        group_of=torch.zeros(size, dtype=torch.int32, device=weight.device), rows=rows, columns=columns, groups=groups,
        size=size, passes=passes, hessian_expert=hessian.stride(0), top=float((1 << bits) - 1),
        SCALE=SCALES[scales.dtype], REACH=REACH, ROWS=ROWS, TILE=TILE, MICRO=MICRO, DEPTH=DEPTH,
        num_warps=_warps(device_info(weight.device)), **OPTIONS,
    )  # fmt: skip
    codes.copy_(own.mT)
    scales.copy_(scale.mT)

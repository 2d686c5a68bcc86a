"""Gram accumulation in Triton: lower-triangle tiles of X^T X on tensor cores, every expert in one launch.

Work of a call with T rows and K inputs, against the T K^2 flops of a triangle: T K (K + M) flops (tiles of M inputs
that cross the diagonal are done whole), T K (K / N + 1) elements of x read through the L2 cache, and the lower half of
the Gram read and written once for every 4096 rows. A tile sums in registers and adds to memory after its loop, so the
Gram's values do not occupy registers while the tensor cores run.

Each tile of the Gram belongs to one program at a time, so there is nothing to lock and the order of additions is
fixed. Ragged experts are found on the device: a program reads where its expert's rows begin and end. Only the last
rows of a stretch are masked; the loop before it moves whole tiles. The tiles on the diagonal also sum |x|.

bf16 and fp16 products are exact in fp32. fp32 inputs are multiplied as three tf32 products of high and low halves
(tf32x3): every product is off by at most 2^-19 |a b|, 16 eps of fp32, which comes on top of the error of the sum. For
random signs that is far below what summing in fp32 costs.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# The arguments of a kernel are what Triton makes of them; they have no Python type.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sarqc_kernels.device import FUSED, device_info, on_device
from sarqc_kernels.gram.config import FLUSH, Plan, Tile, choose

__all__ = ["gram_accumulate_", "launch", "tile_of"]

LANES = 16  # partial sums of |x| for each input: as many as make the additions of a tile's rows local to a thread
SLICE = 2048  # elements of a Gram tile that one program of `_collect` adds up
COUNTS = [
    "ragged",
    "tokens",
    "experts",
    "units",
    "splits",
]  # run-time numbers even where they are 1: one kernel for all
PRECISION = {torch.float32: "tf32x3", torch.bfloat16: "tf32", torch.float16: "tf32"}  # 16-bit products are exact


@triton.jit
def tile_of(unit, RATIO: tl.constexpr):
    """Row and column of tile `unit` of the lower triangle, where row i has i // RATIO + 1 tiles: no table, no search.

    RATIO rows make a group of equal length; the group is a square root away, which one step repairs where fp32 rounds.
    """
    group = ((tl.sqrt(8.0 * (unit // RATIO).to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    group = tl.where(RATIO * (group * (group + 1) // 2) > unit, group - 1, group)
    group = tl.where(RATIO * ((group + 1) * (group + 2) // 2) <= unit, group + 1, group)
    rest = unit - RATIO * (group * (group + 1) // 2)
    return group * RATIO + rest // (group + 1), rest % (group + 1)


@triton.jit
def _stretch(offsets, expert, ragged, tokens, splits, DEPTH: tl.constexpr):
    """First and last row of an expert, and how many rows each of its splits has (whole tiles but for the last)."""
    begin = tl.load(offsets + expert, mask=ragged != 0, other=0).to(tl.int32)
    end = tl.load(offsets + expert + 1, mask=ragged != 0, other=tokens).to(tl.int32)
    return begin, end, tl.cdiv(tl.cdiv(end - begin, splits), DEPTH) * DEPTH


@triton.jit
def _load(x, row, column, stride, inputs, stop, DEPTH: tl.constexpr, SIZE: tl.constexpr):
    """x[row : row + DEPTH, column : column + SIZE] through pointers, zero from row `stop` and column `inputs` on."""
    r, c = tl.arange(0, DEPTH)[:, None], tl.arange(0, SIZE)[None, :]
    inside = (row + r < stop) & (column + c < inputs)
    return tl.load(x + (tl.cast(row, tl.int64) * stride + column) + (r * stride + c), mask=inside, other=0.0)


@triton.jit
def _step(acc, total, a, b, diagonal, DEPTH: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """acc += a^T b; on the diagonal total += |a|, summed to LANES rows."""
    acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    if diagonal:
        total += tl.sum(tl.reshape(tl.abs(a.to(tl.float32)), (DEPTH // LANES, LANES, M)), 0)
    return acc, total


@triton.jit
def _walk(x, x_m, x_n, row, column, start, whole, stop, stride, inputs, diagonal, M: tl.constexpr, N: tl.constexpr,
          DEPTH: tl.constexpr, LANES: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc fp32 [M, N] and total fp32 [LANES, M] of rows start .. whole - 1, whole steps of DEPTH."""
    acc = tl.zeros((M, N), tl.float32)
    total = tl.zeros((LANES, M), tl.float32)
    for t in range(start, whole, DEPTH):
        if DESCRIPTORS:
            a, b = x_m.load([t, row]), x_n.load([t, column])
        else:
            a = _load(x, t, row, stride, inputs, stop, DEPTH, M)
            b = _load(x, t, column, stride, inputs, stop, DEPTH, N)
        acc, total = _step(acc, total, a, b, diagonal, DEPTH, M, LANES, PRECISION)
    return acc, total


@triton.jit
def _add(target, width, tile, high, wide, known):
    """target[:high, :wide] += tile, for a matrix with rows of `width`; = tile where it is not `known` yet."""
    if tile.shape[1] > 64:  # in halves, so that never a whole tile of the Gram sits in registers beside the sum
        half: tl.constexpr = tile.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, half)), (0, 2, 1)))
        _add(target, width, left, high, wide, known)
        _add(target + half, width, right, high, wide - half, known)
    else:
        m, n = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
        inside = (m < high) & (n < wide)
        spot = target + (m * width + n)
        tl.store(spot, tl.load(spot, mask=inside & known, other=0.0) + tile, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _accumulate(x, x_m, x_n, gram, rows, abs_sum, offsets, partial, partial_abs, ragged, tokens, inputs, stride,
                experts, units, splits, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr, FLUSH: tl.constexpr,
                LANES: tl.constexpr, DESCRIPTORS: tl.constexpr, APART: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """Items (split, expert, tile), tile fastest: programs that run together read the same rows.

    One loop goes over the items of a program and over the chunks of FLUSH rows of an item: as everything is worked out
    anew for each chunk, no address of the Gram stays in a register while the tensor cores run.
    """
    item = tl.program_id(0)
    done = 0  # rows of this item that are in memory already
    while item < splits * experts * units:
        unit, expert, split = item % units, item // units % experts, item // units // experts
        begin, end, span = _stretch(offsets, expert, ragged, tokens, splits, DEPTH)
        tile_row, tile_column = tile_of(unit, N // M)
        row, column = tile_row * M, tile_column * N
        diagonal = tile_column == tile_row // (N // M)
        if (unit == 0) & (split == 0) & (done == 0):
            tl.store(rows + expert, tl.load(rows + expert) + (end - begin))
        last = tl.minimum(begin + (split + 1) * span, end)
        start = begin + split * span + done
        stop = tl.minimum(start + FLUSH, last)
        if start < stop:
            whole = start + (stop - start) // DEPTH * DEPTH
            if not APART:
                acc, total = _walk(x, x_m, x_n, row, column, start, whole, stop, stride, inputs, diagonal, M=M, N=N,
                                   DEPTH=DEPTH, LANES=LANES, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION)  # fmt: skip
            elif diagonal:
                acc, total = _walk(x, x_m, x_n, row, column, start, whole, stop, stride, inputs, True, M=M, N=N,
                                   DEPTH=DEPTH, LANES=LANES, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION)  # fmt: skip
            else:
                acc, total = _walk(x, x_m, x_n, row, column, start, whole, stop, stride, inputs, False, M=M, N=N,
                                   DEPTH=DEPTH, LANES=LANES, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION)  # fmt: skip
            for t in tl.range(whole, stop, LANES, num_stages=1):
                a = _load(x, t, row, stride, inputs, stop, LANES, M)
                b = _load(x, t, column, stride, inputs, stop, LANES, N)
                acc, total = _step(acc, total, a, b, diagonal, LANES, M, LANES, PRECISION)
            alone = splits == 1
            if alone:
                corner = gram + tl.cast(expert, tl.int64) * inputs * inputs + tl.cast(row, tl.int64) * inputs + column
                _add(corner, inputs, acc, inputs - row, inputs - column, True)
            else:  # a tile of partial sums of its own, which holds nothing yet
                _add(partial + tl.cast(item, tl.int64) * (M * N), N, acc, M, N, done > 0)
            if diagonal:
                sums = tl.where(alone, abs_sum, partial_abs) + (tl.cast(split, tl.int64) * experts + expert) * inputs
                m = row + tl.arange(0, M)
                known = tl.load(sums + m, mask=(m < inputs) & (alone | (done > 0)), other=0.0)
                tl.store(sums + m, known + tl.sum(total, 0), mask=m < inputs)
        finished = stop >= last
        done = tl.where(finished, 0, done + FLUSH)
        item = tl.where(finished, item + tl.num_programs(0), item)


@triton.jit(do_not_specialize=COUNTS)
def _collect(gram, abs_sum, offsets, partial, partial_abs, ragged, tokens, inputs, experts, units, splits,
             M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr, SLICE: tl.constexpr):  # fmt: skip
    """Add the partial sums of every tile to the Gram, split by split; a program does SLICE rows of a tile."""
    item = tl.program_id(0)
    unit, expert = item % units, item // units
    begin, end, span = _stretch(offsets, expert, ragged, tokens, splits, DEPTH)
    if begin < end:
        filled = tl.cdiv(end - begin, span)
        tile_row, tile_column = tile_of(unit, N // M)
        m, n = tl.program_id(1) * SLICE + tl.arange(0, SLICE), tl.arange(0, N)
        row, column = tile_row * M + m, tile_column * N + n
        inside = (row < inputs)[:, None] & (column < inputs)[None, :]
        spot = gram + expert.to(tl.int64) * inputs * inputs + row[:, None].to(tl.int64) * inputs + column[None, :]
        source = partial + item.to(tl.int64) * (M * N) + m[:, None] * N + n[None, :]
        acc = tl.zeros((SLICE, N), tl.float32)
        for split in range(filled):
            acc += tl.load(source + tl.cast(split, tl.int64) * experts * units * (M * N), mask=inside, other=0.0)
        tl.store(spot, tl.load(spot, mask=inside, other=0.0) + acc, mask=inside)
        if tile_column == tile_row // (N // M):
            here = row < inputs
            total = tl.zeros((SLICE,), tl.float32)
            for split in range(filled):
                at = (tl.cast(split, tl.int64) * experts + expert) * inputs
                total += tl.load(partial_abs + at + row, mask=here, other=0.0)
            spot_abs = abs_sum + expert.to(tl.int64) * inputs + row
            tl.store(spot_abs, tl.load(spot_abs, mask=here, other=0.0) + total, mask=here)


def gram_accumulate_(gram: Tensor, rows: Tensor, abs_sum: Tensor, x: Tensor, offsets: Tensor | None) -> None:
    """Triton implementation of `sarqc_kernels.gram.gram_accumulate_`; does not wait for the device."""
    experts, inputs = abs_sum.shape
    if x.shape[0] and inputs and experts:
        even = not any(size % 16 for size in (inputs, x.stride(0), x.data_ptr())) and x.stride(0) >= inputs
        plan = choose(experts, x.shape[0], inputs, x.dtype, device_info(x.device), even)
        with on_device(x):
            launch(plan, gram, rows, abs_sum, x, offsets)


def launch(plan: Plan, gram: Tensor, rows: Tensor, abs_sum: Tensor, x: Tensor, offsets: Tensor | None) -> None:
    """Run one call by a given plan. With splits > 1 memory for the partial sums is taken, and given back at the end."""
    tile, splits = plan.tile, plan.splits
    (tokens, inputs), experts = x.shape, gram.shape[0]
    units = tile.units(inputs)
    partial, partial_abs = gram, abs_sum  # not read when the rows are whole
    if splits > 1:
        partial = torch.empty(splits * experts * units * tile.m * tile.n, dtype=torch.float32, device=x.device)
        partial_abs = torch.empty(splits * experts * inputs, dtype=torch.float32, device=x.device)
    x_m, x_n = (_operand(x, tile, size) for size in (tile.m, tile.n))
    ragged = int(offsets is not None)
    offsets = rows if offsets is None else offsets  # an address that is never read
    shape = {"M": tile.m, "N": tile.n, "DEPTH": tile.depth}
    _accumulate[(plan.programs,)](
        x, x_m, x_n, gram, rows, abs_sum, offsets, partial, partial_abs, ragged=ragged, tokens=tokens, inputs=inputs,
        stride=x.stride(0), experts=experts, units=units, splits=splits, **shape,
        **_constants(tile, x.dtype), num_warps=tile.warps, num_stages=tile.stages, **FUSED,
    )  # fmt: skip
    if splits > 1:
        _collect[(experts * units, tile.m // _slice(tile.m, tile.n))](
            gram, abs_sum, offsets, partial, partial_abs, ragged, tokens, inputs, experts, units, splits, **shape,
            SLICE=_slice(tile.m, tile.n), num_warps=4, **FUSED,
        )  # fmt: skip


def _operand(x: Tensor, tile: Tile, size: int) -> Any:
    """x as the kernel takes it: itself, or the descriptor that its bulk copies go by."""
    return TensorDescriptor.from_tensor(x, [tile.depth, size]) if tile.descriptors else x


def _slice(m: int, n: int) -> int:
    """Rows of a tile that one program of `_collect` adds up."""
    return min(m, SLICE // n)


def _constants(tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of `_accumulate` beside the shape of its tiles."""
    return {
        "FLUSH": FLUSH,
        "LANES": LANES,
        "DESCRIPTORS": tile.descriptors,
        "APART": tile.apart,
        "PRECISION": PRECISION[dtype],
    }

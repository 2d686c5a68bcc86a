"""`dequantize` in Triton: one pass, a byte or half a byte of codes read for each two or four bytes written.

A program takes ROWS x 128 weights, as [ROWS, GROUPS, WIDTH] with WIDTH columns that share their scales: no scale is
loaded twice by a row. Codes are decoded with integers, so the kernel is the same on GPUs without FP8 (sm_80). The bits
of a code, moved under the exponent of fp32, are its value times a power of two, subnormal codes included; one
multiplication takes that power out. Decoding is exact, so only the product and the result's dtype round.

Bytes: K N (1 + out) of FP8, K N (1/2 + out) of FP4, and the scales.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# The arguments of a kernel are what Triton makes of them; they have no Python type.

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sarqc_kernels.device import FUSED, on_device

__all__ = ["dequantize"]

ROWS, COLUMNS, WARPS = 32, 128, 4

E2M1_UNIT = tl.constexpr(2.0**126)  # fp32's bias less that of the format, as a power of two
E4M3_UNIT = tl.constexpr(2.0**120)


@triton.jit
def _e2m1(nibble):
    """fp32 of four-bit floats in int32, with a sign of zero too."""
    value = ((nibble & 7) << 22) | ((nibble & 8) << 28)
    return value.to(tl.float32, bitcast=True) * E2M1_UNIT


@triton.jit
def _e4m3(code):
    """fp32 of float8_e4m3fn in int32; 0x7f and 0xff are NaN."""
    value = ((code & 0x7F) << 20) | ((code & 0x80) << 24)
    decoded = value.to(tl.float32, bitcast=True) * E4M3_UNIT
    return tl.where((code & 0x7F) == 0x7F, float("nan"), decoded)


@triton.jit
def _factor(scale, level, SCALE: tl.constexpr, LEVEL: tl.constexpr):
    """fp32 factors of stored scales, combined with the second level."""
    if SCALE == "e8m0":
        code = scale.to(tl.int32)
        factor = tl.where(code == 0, 1 << 22, code << 23).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        factor = _e4m3(scale.to(tl.int32))
    else:
        factor = scale.to(tl.float32)
    if LEVEL == "divide":
        factor = tl.div_rn(factor, tl.zeros_like(factor) + tl.load(level))
    elif LEVEL == "multiply":
        factor = factor * tl.load(level)
    return factor


@triton.jit
def _dequantize(
    codes, scales, level, out, rows, columns, block_rows, widths_per_block, down, across,
    PACKED: tl.constexpr, SCALE: tl.constexpr, LEVEL: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix. WIDTH: columns of a group; widths_per_block groups share a scale, of down x across."""
    wide, tall = tl.cdiv(columns, GROUPS * WIDTH), tl.cdiv(rows, ROWS)
    tile = tl.program_id(0)
    matrix = (tile // (wide * tall)).to(tl.int64)
    row = tile // wide % tall * ROWS + tl.arange(0, ROWS)
    group = tile % wide * GROUPS + tl.arange(0, GROUPS)
    live_row, live_group = row < rows, group * WIDTH < columns
    place = (matrix * down + row // block_rows)[:, None] * across + (group // widths_per_block)[None, :]
    scale = tl.load(scales + place, mask=live_row[:, None] & live_group[None, :], other=0)
    factor = _factor(scale, level, SCALE, LEVEL)[:, :, None]
    line = (matrix * rows + row)[:, None, None]
    column = group[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    if PACKED:
        pair = group[None, :, None] * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, None, :]
        mask = live_row[:, None, None] & (pair < columns // 2)
        code = tl.load(codes + line * (columns // 2) + pair, mask=mask, other=0).to(tl.int32)
        value = tl.interleave(_e2m1(code & 15) * factor, _e2m1(code >> 4) * factor)
    else:
        mask = live_row[:, None, None] & (column < columns)
        code = tl.load(codes + line * columns + column, mask=mask, other=0).to(tl.int32)
        value = _e4m3(code) * factor
    inside = live_row[:, None, None] & (column < columns)
    tl.store(out + line * columns + column, value.to(out.dtype.element_ty), mask=inside)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype,
    packed: bool,
    kind: str,
    divide: bool,
) -> Tensor:
    """Triton implementation of the operation `sarqc::dequantize`; does not wait for the device."""
    batch, rows, stored = codes.shape
    columns = stored * (2 if packed else 1)
    out = torch.empty((batch, rows, columns), dtype=dtype, device=codes.device)
    if not out.numel():
        return out
    width = width_of(block_columns, columns)
    shared = -(-min(block_columns, columns) // width)  # groups of a block
    tiles = batch * -(-rows // ROWS) * -(-columns // COLUMNS)
    with on_device(codes):
        _dequantize[(tiles,)](
            codes, scales, global_scale, out, rows, columns, block_rows, shared, *scales.shape[1:],
            PACKED=packed, SCALE=kind, LEVEL="none" if global_scale is None else "divide" if divide else "multiply",
            ROWS=ROWS, GROUPS=COLUMNS // width, WIDTH=width, num_warps=WARPS, **FUSED,
        )  # fmt: skip
    return out


def width_of(block_columns: int, columns: int) -> int:
    """Columns of a group: the largest power of two that divides a scale's columns, all of a tile's at most."""
    return COLUMNS if block_columns >= columns else math.gcd(block_columns, COLUMNS)

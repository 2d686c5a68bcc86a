"""`cross_gram_accumulate_` in Triton: tiles of R^T X on tensor cores, one program each.

A program sums a tile of M outputs by N inputs over all rows, in registers, and adds it to memory once for every FLUSH
rows, as the Gram does. Where R is fp32 and x bf16, the two halves of R share what is loaded of x. Flops of a call:
2 T N K, twice with halves; bytes from the L2 cache: 2 T N K (2 / M + 1 / N) with halves.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# The arguments of a kernel are what Triton makes of them; they have no Python type.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sarqc_kernels.device import FUSED, Device, device_info, on_device
from sarqc_kernels.gram.config import FLUSH
from sarqc_kernels.gram.triton_impl import _load

__all__ = ["cross_gram_accumulate_"]


class Tile(NamedTuple):
    """What is compiled: outputs and inputs of a tile, rows at a time, warps, stages of copies."""

    m: int
    n: int
    depth: int
    warps: int
    stages: int


LARGE, NARROW, SMALL = Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(64, 64, 16, 4, 2)
"""The large one takes 72 KiB of shared memory with halves, which every GPU from sm_80 on has. Where sums and operands
share the registers it spills, and the narrow one does not. The small one is for rows that are read element by element,
whose addresses need registers (twice the warps where sums are there too), and for fp32, whose products are three."""


def tile_of_call(dtype: torch.dtype, even: bool, device: Device) -> Tile:
    """even: widths, row strides and addresses are multiples of 16, so that copies can be wide."""
    crowded = device.sums_in_registers
    if not even:
        return SMALL._replace(warps=8) if crowded else SMALL
    if dtype == torch.float32:
        return SMALL
    return NARROW if crowded else LARGE


@triton.jit(do_not_specialize=["tokens"])
def _cross(
    cross, high, low, x, tokens, outputs, inputs, high_stride, low_stride, stride, M: tl.constexpr, N: tl.constexpr,
    DEPTH: tl.constexpr, FLUSH: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """cross [outputs, inputs] += (high + low)^T x for the tile of this program."""
    wide = tl.cdiv(inputs, N)
    row, column = tl.program_id(0) // wide * M, tl.program_id(0) % wide * N
    m, n = row + tl.arange(0, M), column + tl.arange(0, N)
    spot = cross + m[:, None].to(tl.int64) * inputs + n[None, :]
    inside = (m < outputs)[:, None] & (n < inputs)[None, :]
    for first in range(0, tokens, FLUSH):
        stop = tl.minimum(first + FLUSH, tokens)
        acc = tl.zeros((M, N), tl.float32)
        for t in range(first, stop, DEPTH):
            b = _load(x, t, column, stride, inputs, stop, DEPTH, N)
            a = _load(high, t, row, high_stride, outputs, stop, DEPTH, M)
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
            if HALVES:
                rest = _load(low, t, row, low_stride, outputs, stop, DEPTH, M)
                acc = tl.dot(rest.T, b, acc, input_precision=PRECISION)
        tl.store(spot, tl.load(spot, mask=inside, other=0.0) + acc, mask=inside)


def cross_gram_accumulate_(cross: Tensor, residual: Tensor, x: Tensor) -> None:
    """Triton implementation of `sarqc_kernels.gram.cross.cross_gram_accumulate_`; does not wait for the device."""
    (outputs, inputs), tokens = cross.shape, len(x)
    if not (outputs and inputs and tokens):
        return
    halves = x.dtype == torch.bfloat16 and residual.dtype != x.dtype
    if halves:
        high = residual.to(x.dtype)
        low = (residual.float() - high.float()).to(x.dtype)
    else:  # fp16 has too little range for halves: two dtypes meet in fp32
        if residual.dtype != x.dtype:
            residual, x = residual.float(), x.float()
        high = low = residual
    numbers = (outputs, inputs, *(each for rows in (high, low, x) for each in (rows.stride(0), rows.data_ptr())))
    own = tile_of_call(x.dtype, not any(number % 16 for number in numbers), device_info(x.device))
    with on_device(x):
        _cross[(-(-outputs // own.m) * -(-inputs // own.n),)](
            cross, high, low, x, tokens, outputs, inputs, high.stride(0), low.stride(0), x.stride(0), M=own.m, N=own.n,
            DEPTH=own.depth, FLUSH=FLUSH, HALVES=halves, PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
            num_warps=own.warps, num_stages=own.stages, **FUSED,
        )  # fmt: skip

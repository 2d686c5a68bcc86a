"""`cholesky_upper` in Triton: blocked and left-looking, a program for each matrix, no workspace but the factor.

Blocks of columns are taken from the last to the first, as M is upper triangular. A tile of a block gains nothing until
its turn; then all products with finished columns are taken off at once, on tensor cores as three TF32 products. The
tile on the diagonal is factored pivot by pivot in registers, and its inverse with it, by which the tiles above it are
multiplied: a triangular solve as a product.

Flops of a matrix: K^3 / 3, three times that in TF32; for each tile above the diagonal one product more. Pivots are a
chain of K steps.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# The arguments of a kernel are what Triton makes of them; they have no Python type.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sarqc_kernels.device import FUSED, device_info, on_device

__all__ = ["cholesky_upper"]

BLOCK, WARPS = 64, 4
"""Blocks of half the size by twice the warps where registers do not hold three such tiles: where sums of tensor cores
are in them too, and where rows do not begin at multiples of 64 bytes, as addresses take them then."""


@triton.jit
def _tile(matrix, row, column, inputs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Elements [ROWS, COLUMNS] from (row, column) on; zero beyond the matrix."""
    r, c = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    return tl.load(matrix + (r * inputs + c), mask=(r < inputs) & (c < inputs), other=0.0)


@triton.jit
def _left(matrix, factor, row, column, inputs, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    """A tile of the matrix less what the columns behind `column` + SIZE have of it."""
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(column + SIZE, inputs, DEPTH):
        a, b = _tile(factor, row, k, inputs, SIZE, DEPTH), _tile(factor, column, k, inputs, SIZE, DEPTH)
        total = tl.dot(a, tl.trans(b), total, input_precision="tf32x3")
    return _tile(matrix, row, column, inputs, SIZE, SIZE) - total


@triton.jit
def _pivots(tile, bad, name, SIZE: tl.constexpr):
    """(factor of a symmetric tile, its inverse, `bad` or what to call the first pivot that is not above zero)."""
    r, c = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    factor = tl.zeros((SIZE, SIZE), tl.float32)
    inverse = tl.where(r == c, 1.0, 0.0)
    for step in range(SIZE):
        k = SIZE - 1 - step
        column = tl.sum(tl.where(c == k, tile, 0.0), 1)[:, None]
        line = tl.sum(tl.where(r == k, tile, 0.0), 0)[None, :]  # the same, as the tile is symmetric
        pivot = tl.sum(tl.sum(tl.where((r == k) & (c == k), tile, 0.0), 1), 0)
        bad = tl.where((bad == 0) & ((pivot > 0.0) == 0), name - k, bad)
        root = tl.sqrt_rn(pivot)
        over = tl.div_rn(1.0, root)  # a division of every element takes many registers
        column = tl.where(r < k, column * over, 0.0)
        line = tl.where(c < k, line * over, 0.0)
        factor = tl.where(c == k, tl.where(r == k, root, column), factor)
        tile -= column * line
        own = tl.sum(tl.where(r == k, inverse, 0.0), 0)[None, :] * over
        inverse = tl.where(r == k, own, inverse - column * own)
    return factor, inverse, bad


@triton.jit
def _factor(matrix, factor, info, inputs, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    """The factor of the matrix of this program; `factor` is zero before."""
    expert = tl.program_id(0).to(tl.int64)
    matrix, factor = matrix + expert * inputs * inputs, factor + expert * inputs * inputs
    r, c = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    bad = 0
    blocks = tl.cdiv(inputs, SIZE)
    for block in range(blocks):
        column = (blocks - 1 - block) * SIZE
        live = inputs - column
        tile = _left(matrix, factor, column, column, inputs, SIZE, DEPTH)
        tile, inverse, bad = _pivots(tl.where((r == c) & (r >= live), 1.0, tile), bad, live, SIZE)
        tl.store(factor + ((column + r) * inputs + column + c), tile, mask=(r < live) & (c < live))
        for row in range(0, column, SIZE):
            above = _left(matrix, factor, row, column, inputs, SIZE, DEPTH)
            above = tl.dot(above, tl.trans(inverse), input_precision="tf32x3")
            tl.store(factor + ((row + r) * inputs + column + c), above, mask=c < live)
        tl.debug_barrier()  # what a thread wrote here, others read for the columns before
    tl.store(info + expert, bad)


def cholesky_upper(hessian: Tensor, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Triton implementation of `sarqc_kernels.gram.cholesky.cholesky_upper`. size: of a block."""
    experts, inputs = hessian.shape[:2]
    factor = torch.zeros((experts, inputs, inputs), device=hessian.device)
    info = torch.zeros(experts, dtype=torch.int32, device=hessian.device)
    crowded = inputs % 16 > 0 or device_info(hessian.device).sums_in_registers
    size, warps = size or (BLOCK // 2 if crowded else BLOCK), 2 * WARPS if crowded else WARPS
    if experts and inputs:
        own = {"SIZE": size, "DEPTH": size // 2, "num_warps": warps, "num_stages": 2}
        with on_device(hessian):
            _factor[(experts,)](hessian.contiguous(), factor, info, inputs, **own, **FUSED)
    return factor, info

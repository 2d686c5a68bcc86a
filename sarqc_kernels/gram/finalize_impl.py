"""From sums to the matrix that is factored, in Triton: mirror, divide, regularise, without waiting for the device.

Two launches. The first has a program for each expert, which averages the diagonal (K loads); the second has one for
each tile on or below the diagonal, which reads its tile once and writes it twice, as it is and transposed. Traffic of
an expert: 2 K^2 bytes read, 4 K^2 written, the least there is; K^2 flops. Quotients are rounded as IEEE has it, so
off the diagonal the result has the reference's bits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# The arguments of a kernel are what Triton makes of them; they have no Python type.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sarqc_kernels.device import FUSED, on_device
from sarqc_kernels.gram.triton_impl import tile_of

__all__ = ["gram_finalize"]

SIZE, WARPS = 64, 4  # a tile and its transpose pass through shared memory
BLOCK = 1024


@triton.jit
def _mean_diagonal(gram, rows, mean, inputs, BLOCK: tl.constexpr):
    """mean[expert] of diag(gram) / rows; 1 where that is not above zero."""
    expert = tl.program_id(0)
    count = tl.maximum(tl.load(rows + expert), 1).to(tl.float32)
    base = gram + tl.cast(expert, tl.int64) * inputs * inputs
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, inputs, BLOCK):
        k = first + tl.arange(0, BLOCK)
        values = tl.load(base + k.to(tl.int64) * (inputs + 1), mask=k < inputs, other=0.0)
        total += tl.div_rn(values, tl.zeros_like(values) + count)
    average = tl.sum(total, 0) / inputs
    tl.store(mean + expert, tl.where(average > 0, average, 1.0))


@triton.jit(do_not_specialize=["units"])
def _finalize(gram, rows, saliency, reg_lambda, mean, out, damp, inputs, units, SIZE: tl.constexpr):
    """One tile and its mirror image; on the diagonal what regularises is added."""
    item = tl.program_id(0)
    unit, expert = item % units, item // units
    tile_row, tile_column = tile_of(unit, 1)
    i, j = tile_row * SIZE + tl.arange(0, SIZE), tile_column * SIZE + tl.arange(0, SIZE)
    inside = (i < inputs)[:, None] & (j < inputs)[None, :]
    base = tl.cast(expert, tl.int64) * inputs * inputs
    spot = base + i[:, None].to(tl.int64) * inputs + j[None, :]
    image = base + j[:, None].to(tl.int64) * inputs + i[None, :]
    lower = i[:, None] >= j[None, :]
    tile = tl.load(gram + spot, mask=inside & lower, other=0.0)
    count = tl.maximum(tl.load(rows + expert), 1).to(tl.float32)
    tile = tl.div_rn(tile, tl.zeros_like(tile) + count)
    if tile_row == tile_column:
        known = tl.load(saliency + tl.cast(expert, tl.int64) * inputs + i, mask=i < inputs, other=0.0)
        added = tl.load(reg_lambda + expert) * known + damp * tl.load(mean + expert)
        tile = tl.where(lower, tile, tl.trans(tile))
        tile = tl.where(i[:, None] == j[None, :], tile + added[:, None], tile)
    else:
        tl.store(out + image, tl.trans(tile), mask=(j < inputs)[:, None] & (i < inputs)[None, :])
    tl.store(out + spot, tile, mask=inside)


def gram_finalize(gram: Tensor, rows: Tensor, saliency: Tensor, reg_lambda: Tensor, damp: float) -> Tensor:
    """Triton implementation of `sarqc_kernels.gram.gram_finalize`; does not wait for the device."""
    experts, inputs = saliency.shape
    out, mean = torch.empty_like(gram), torch.empty(experts, dtype=torch.float32, device=gram.device)
    if experts and inputs:
        side = -(-inputs // SIZE)
        units = side * (side + 1) // 2
        with on_device(gram):
            _mean_diagonal[(experts,)](gram, rows, mean, inputs, BLOCK=BLOCK, num_warps=WARPS, **FUSED)
            _finalize[(experts * units,)](
                gram, rows, saliency, reg_lambda, mean, out, damp, inputs, units, SIZE=SIZE, num_warps=WARPS, **FUSED
            )
    return out

"""W4A16 in plain torch: unpack some rows of the weight, dequantize them in fp32, multiply, next.

Tiles of rows keep the dequantized part of the weight small and in cache; a tile is used for every token of its expert,
so each weight is unpacked once per call. Experts without tokens are skipped.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sarqc_kernels.packing import unpack

__all__ = ["w4a16_matmul"]

TILE = 1 << 20  # weights unpacked at a time
LEAST_ROWS = 128  # of a tile: a GEMM with fewer outputs is slow


def w4a16_matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    offsets: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """Reference of `sarqc_kernels.w4a16.w4a16_matmul`. Reading `offsets` waits for the device."""
    bounds = [0, x.shape[0]] if offsets is None else offsets.tolist()
    outputs = qweight.shape[1]
    out = x.new_zeros((x.shape[0], outputs))
    tall = max(LEAST_ROWS, TILE // max(1, x.shape[1]))
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        for row in range(0, outputs, tall):
            at = (expert, slice(row, min(row + tall, outputs)))
            zero = None if zeros is None else zeros[at]
            weight = _dequantize(qweight[at], scales[at], zero, bits, x.shape[1]).to(x.dtype)
            tile = out[begin:end, at[1]]
            if bias is None:
                torch.mm(x[begin:end], weight.T, out=tile)
            else:
                torch.addmm(bias[at].to(x.dtype), x[begin:end], weight.T, out=tile)
    return out


def _dequantize(qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, inputs: int) -> Tensor:
    """fp32 [rows, inputs] of packed rows: (code - zero) * scale."""
    groups = unpack(qweight, bits, inputs).unflatten(-1, (scales.shape[-1], -1)).float()
    zero = 1 << (bits - 1) if zeros is None else zeros.float().unsqueeze(-1)
    weight: Tensor = groups.sub_(zero).mul_(scales.float().unsqueeze(-1)).flatten(-2)
    return weight

"""W4A16 in plain torch: take some rows of the weight out of its layout, dequantize them in fp32, multiply, next.

Tiles of rows keep the dequantized part of the weight small and in cache; a tile is used for every token of its expert,
so each weight is unpacked once per call. Experts without tokens are skipped.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sarqc_kernels.w4a16.layout import RepackedWeight, codes_of, grid_of

__all__ = ["w4a16_matmul"]

TILE = 1 << 20  # weights unpacked at a time
LEAST_ROWS = 128  # of a tile: a GEMM with fewer outputs is slow


def w4a16_matmul(x: Tensor, weight: RepackedWeight, offsets: Tensor | None, bias: Tensor | None) -> Tensor:
    """Reference of `sarqc_kernels.w4a16.w4a16_matmul`; takes every layout. Reading `offsets` waits for the device."""
    bounds = [0, x.shape[0]] if offsets is None else offsets.tolist()
    out = x.new_zeros((x.shape[0], weight.out_features))
    tall = max(LEAST_ROWS, TILE // max(1, x.shape[1]))
    scales, zeros = grid_of(weight)
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        for row in range(0, weight.out_features, tall):
            rows = slice(row, min(row + tall, weight.out_features))
            at = (expert, rows)
            codes = codes_of(weight, expert, rows)
            tile = _dequantize(codes, scales[at], None if zeros is None else zeros[at], weight.bits).to(x.dtype)
            target = out[begin:end, rows]
            if bias is None:
                torch.mm(x[begin:end], tile.T, out=target)
            else:  # cuBLAS takes another routine where the bias is strided, and so another order of sums
                torch.addmm(bias[at].to(x.dtype).contiguous(), x[begin:end], tile.T, out=target)
    return out


def _dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """fp32 [rows, K]: (code - zero) * scale."""
    groups = codes.unflatten(-1, (scales.shape[-1], -1)).float()
    zero = 1 << (bits - 1) if zeros is None else zeros.float().unsqueeze(-1)
    weight: Tensor = groups.sub_(zero).mul_(scales.float().unsqueeze(-1)).flatten(-2)
    return weight

"""Gram accumulation in plain torch: fp32 products of the lower triangle, block row by block row.

bf16 and fp16 activations become fp32 first, a bounded stretch of rows at a time: products of two of them are exact in
fp32, and an fp32 GEMM is the fast one on most CPUs. A block row G[i:j, :j] is one GEMM; more block rows waste less
above the diagonal, fewer keep the GEMMs large.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["add_to_diagonal_", "gram_accumulate_", "gram_finalize", "symmetrize_"]

BLOCKS = 4  # block rows of a Gram: with 4 of them 5/8 of the full product is computed
LEAST_BLOCK = 128  # columns; smaller GEMMs lose more than the triangle saves
MIRROR_BLOCK = 512
STRETCH = 1 << 21  # elements of x in fp32 at a time: a copy that the allocator reuses and a cache can hold


def gram_accumulate_(gram: Tensor, rows: Tensor, abs_sum: Tensor, x: Tensor, offsets: Tensor | None) -> None:
    """Reference of `sarqc_kernels.gram.gram_accumulate_`. Reading `offsets` waits for the device."""
    bounds = [0, x.shape[0]] if offsets is None else offsets.tolist()
    stretch = max(1024, STRETCH // max(1, x.shape[1]))
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        rows[expert] += end - begin
        for first in range(begin, end, stretch):
            part = x[first : min(first + stretch, end)].float()
            abs_sum[expert] += part.abs().sum(0)
            _add_lower_(gram[expert], part)


def _add_lower_(gram: Tensor, x: Tensor) -> None:
    """gram [K, K] += x^T x on and below the diagonal, x [T, K] fp32."""
    inputs = x.shape[1]
    block = max(LEAST_BLOCK, -(-inputs // BLOCKS))
    for first in range(0, inputs, block):
        last = min(first + block, inputs)
        gram[first:last, :last].addmm_(x[:, first:last].T, x[:, :last])


def symmetrize_(gram: Tensor) -> Tensor:
    """Mirror the lower triangle of [..., K, K] in place, block by block."""
    inputs = gram.shape[-1]
    for first in range(0, inputs, MIRROR_BLOCK):
        last = min(first + MIRROR_BLOCK, inputs)
        corner = gram[..., first:last, first:last]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        gram[..., first:last, last:] = gram[..., last:, first:last].mT
    return gram


def gram_finalize(gram: Tensor, rows: Tensor, saliency: Tensor, reg_lambda: Tensor, damp: float) -> Tensor:
    """Reference of `sarqc_kernels.gram.gram_finalize`."""
    return add_to_diagonal_(symmetrize_(gram / rows.clamp(min=1)[:, None, None]), saliency, reg_lambda, damp)


def add_to_diagonal_(mean: Tensor, saliency: Tensor, reg_lambda: Tensor, damp: float) -> Tensor:
    """The regulariser and the damping, added to the diagonal of mean [E, K, K] in place; returns mean."""
    diagonal = mean.diagonal(dim1=1, dim2=2)
    level = diagonal.mean(1, keepdim=True)
    diagonal += reg_lambda[:, None] * saliency + damp * torch.where(level > 0, level, torch.ones_like(level))
    return mean

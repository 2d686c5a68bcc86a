"""GPTQ as published (arXiv 2210.17323, algorithm 1), one torch operation after another: where everybody starts from.

Written from the paper's equations: H^-1 = U^T U with U upper triangular; column j is rounded, its error over U_jj
spreads to the columns behind it by row j of U, at once inside a block and by one product behind it. Three
factorisations (Cholesky, inverse, Cholesky of the inverse) and about ten launches a column.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def inverse_factor(hessian: Tensor) -> Tensor:
    """U [..., K, K], upper triangular, with inverse(hessian) = U^T U."""
    lower = torch.linalg.cholesky(hessian)
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return factor


def quantize(weight: Tensor, hessian: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Codes uint8 [N, K] of one weight fp32 [N, K] on a given grid [N, K / g]; hessian fp32 [K, K], damped already."""
    rows, columns = weight.shape
    group, top = columns // scales.shape[1], (1 << bits) - 1
    factor, left = inverse_factor(hessian), weight.clone()
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        errors = torch.zeros(rows, last - first, device=weight.device)
        for j in range(first, last):
            scale, zero = scales[:, j // group].float(), zeros[:, j // group].float()
            level = (left[:, j] / scale + zero).round().clamp(0, top)
            codes[:, j] = level.to(torch.uint8)
            error = (left[:, j] - (level - zero) * scale) / factor[j, j]
            left[:, j:last] -= error[:, None] * factor[j, None, j:last]
            errors[:, j - first] = error
        left[:, last:] -= errors @ factor[first:last, last:]
    return codes

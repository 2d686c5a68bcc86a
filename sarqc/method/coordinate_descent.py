"""After the greedy pass: codes and scales improve each other, and no row becomes worse.

The greedy solver fixes a group's scale before it rounds the group's columns, and a column before it rounds those behind
it. Given all that it chose, the same objective tr[E H E^T], E = W - Q, with the regulariser in H, goes further down by
coordinate descent: one unknown at a time takes its best value while all others keep theirs, group after group.

Scales. Q is linear in a row's scales, so with c = code - zero the best change of the scale of group g is
c_g (E H)_g^T / (c_g H_gg c_g^T). It is rounded to what can be stored.

Codes. The best code of column j is w_j + (sum over i != j of e_i H_ij) / H_jj, rounded; columns in front have their new
errors by then, those behind their old ones. `quantize_columns` does that for the columns of a group, given the triangle
U of H_gg (diagonal included) where the greedy pass has the factor, and Q_g + (E H)_g U^-1 where it has W: its feedback,
the sum over i < j of (that - q_new)_i U_ij / U_jj, then adds up to just this.

What a change D of a group's weights saves is 2 D (E H)_g^T - D H_gg D^T, so a row can refuse one that fp32 got wrong.
All but keeping E H up to date is local to the group: a sweep takes one product with a K x K matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sarqc.method.weight import QuantizedWeight
from sarqc_kernels.columns import quantize_columns
from sarqc_kernels.products import rows_product, solve_rows

REACH = 2.0
"""A scale changes by less than this factor at once; one that wants more is of weights that hardly matter."""


def descend(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, sweeps: int) -> QuantizedWeight:
    """`quantized` after so many sweeps over its groups.

    weight: fp32 [E, N, K]. hessian: fp32 [E, K, K], symmetric. Zeros stay what they are. An expert whose metric has a
    diagonal that is not finite and positive everywhere stays as it is.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    usable = (torch.isfinite(diagonal) & (diagonal > 0)).all(-1)[:, None, None]
    codes, scales, size = quantized.codes.clone(), quantized.scales.clone(), quantized.group_size
    passed = rows_product(weight - quantized.dequantize(), hessian)
    for _ in range(sweeps):
        for group in range(scales.shape[-1]):
            at = slice(group * size, (group + 1) * size)
            part = QuantizedWeight(
                codes[..., at], scales[..., group, None], quantized.zeros[..., group, None], quantized.bits
            )
            codes[..., at], scales[..., group, None], change = _improved(
                part, hessian[:, at, at], passed[..., at], usable
            )
            passed -= rows_product(change, hessian[:, at])
    return QuantizedWeight(codes, scales, quantized.zeros, quantized.bits)


def _improved(part: QuantizedWeight, hessian: Tensor, passed: Tensor, usable: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Better codes and then a better scale of one group, and by how much its weights change, fp32 [E, N, g].

    hessian: H_gg [E, g, g]. passed: (E H)_g [E, N, g].
    """
    before = part.dequantize()
    upper = hessian.triu()
    codes, _, _ = quantize_columns(
        before + solve_rows(upper, passed),
        upper,
        None,
        part.scales.contiguous(),
        part.zeros.contiguous(),
        bits=part.bits,
        group_size=part.group_size,
        sym=True,  # not read, nor is search: the grid is given
        search=False,
        scale_dtype=part.scales.dtype,
    )
    levels, old = codes.float() - part.zeros.float(), part.scales.float()
    rest = passed - rows_product(levels * old - before, hessian)
    new = (old + _rowwise(levels, rest) / _rowwise(rows_product(levels, hessian), levels)).to(part.scales.dtype).float()
    growth = new / old
    within = (growth > 1 / REACH) & (growth < REACH)  # not so for NaN: a group of zeros keeps its scale
    new = torch.where(within, new, old)
    change = levels * new - before
    better = (_rowwise(change, 2 * passed - rows_product(change, hessian)) > 0) & usable
    scales = torch.where(better, new, old).to(part.scales.dtype)
    return torch.where(better, codes, part.codes), scales, torch.where(better, change, 0.0)


def _rowwise(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows, [E, N, 1]."""
    return (left * right).sum(-1, keepdim=True)

"""After the greedy pass: scales and codes improve each other, and no row becomes worse.

The greedy solver fixes a group's scale before it rounds the group's columns, and a column before it rounds those behind
it. Given all that it chose, the same objective tr[E H E^T], E = W - Q, with the regulariser in H, goes further down by
coordinate descent (one unknown at a time takes its best value while all others keep theirs), and all of it is exact:

Scales. Q is linear in a row's scales, so with c = code - zero the best change of the scale of group g is
c_g (E H)_g^T / (c_g H_gg c_g^T). It is rounded to what can be stored, and made where it helps.

Codes. The best code of column j is w_j + (sum over i != j of e_i H_ij) / H_jj, rounded; columns in front have their new
errors by then, those behind their old ones. That is what `quantize_columns` does, given the triangle U of H (diagonal
included) where the greedy pass has the factor, and Q + E H U^-1 where it has W: its feedback, the sum over i < j of
(that - q_new)_i U_ij / U_jj, then adds up to just this. So a sweep over the codes costs what the greedy pass does, plus
two products with K x K matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sarqc.method.weight import QuantizedWeight
from sarqc_kernels.columns import quantize_columns

REACH = 2.0
"""A scale changes by less than this factor at once."""


def descend(weight: Tensor, quantized: QuantizedWeight, metric: Tensor, sweeps: int) -> QuantizedWeight:
    """`quantized` after so many sweeps over its codes, its scales fitted before each of them and after the last.

    weight: fp32 [E, N, K]. metric: fp32 [E, K, K], symmetric. Zeros stay what they are. An expert whose metric has a
    diagonal that is not finite and positive everywhere stays as it is.
    """
    diagonal = metric.diagonal(dim1=-2, dim2=-1)
    usable = (torch.isfinite(diagonal) & (diagonal > 0)).all(-1)[:, None, None]
    upper = metric.triu()
    passed = (weight - quantized.dequantize()) @ metric
    for _ in range(sweeps):
        quantized = _fit_scales(quantized, metric, passed, usable)
        quantized, passed = _sweep_codes(weight, quantized, metric, upper, passed, usable)
    return _fit_scales(quantized, metric, passed, usable)


def _fit_scales(quantized: QuantizedWeight, metric: Tensor, passed: Tensor, usable: Tensor) -> QuantizedWeight:
    """Scales that serve the codes best, group after group. passed: E H [E, N, K], kept up to date in place."""
    size = quantized.group_size
    scales = quantized.scales.clone()
    for group in range(scales.shape[-1]):
        at = slice(group * size, (group + 1) * size)
        levels = quantized.codes[..., at].float() - quantized.zeros[..., group, None].float()
        gain = (levels * passed[..., at]).sum(-1, keepdim=True)
        price = ((levels @ metric[:, at, at]) * levels).sum(-1, keepdim=True)
        old = scales[..., group, None].float()
        new = (old + gain / price).to(scales.dtype).float()
        step = new - old
        # False for NaN too, so a group of zeros stays. A group that wants another scale altogether hardly matters.
        better = ((2 * gain - step * price) * step > 0) & (new > old / REACH) & (new < old * REACH) & usable
        scales[..., group, None] = torch.where(better, new, old).to(scales.dtype)
        passed.baddbmm_(levels * torch.where(better, step, 0.0), metric[:, at], alpha=-1)
    return QuantizedWeight(quantized.codes, scales, quantized.zeros, quantized.bits)


def _sweep_codes(
    weight: Tensor, quantized: QuantizedWeight, metric: Tensor, upper: Tensor, passed: Tensor, usable: Tensor
) -> tuple[QuantizedWeight, Tensor]:
    """Codes that serve best with the scales, column after column, and E H with them.

    A row that became worse all the same, by rounding errors in fp32, keeps what it had.
    """
    before = quantized.dequantize()
    codes, _, _ = quantize_columns(
        before + torch.linalg.solve_triangular(upper, passed, upper=True, left=False),
        upper,
        None,
        quantized.scales,
        quantized.zeros,
        bits=quantized.bits,
        group_size=quantized.group_size,
        sym=quantized.sym,
        search=False,
        scale_dtype=quantized.scales.dtype,
    )
    swept = QuantizedWeight(codes, quantized.scales, quantized.zeros, quantized.bits)
    error = weight - swept.dequantize()
    now = error @ metric
    better = _rowwise(now, error) < _rowwise(passed, weight - before)
    better &= usable
    codes = torch.where(better, codes, quantized.codes)
    return QuantizedWeight(codes, quantized.scales, quantized.zeros, quantized.bits), torch.where(better, now, passed)


def _rowwise(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows, [E, N, 1]."""
    return (left * right).sum(-1, keepdim=True)

"""Scales and zero-points with the least output error for RTN: errors within a group may cancel.

The search in the kernels weights every squared error separately, which is right where a solver corrects errors later.
RTN corrects nothing, so the error e of a group costs e H_gg e^T, with the group's block of the Hessian. The candidates
are those of the kernels: the min-max span times every factor of `span_factors`, negative where the largest weight is
positive; the first of equals wins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sarqc_kernels.columns import fit_grid
from sarqc_kernels.columns.grid import GridRule, grid_of, levels_of, negated, span_factors, span_of

ELEMENTS = 1 << 22
"""Weights in flight: rows are taken in chunks of about this many."""


def search_scales(weight: Tensor, hessian: Tensor, rule: GridRule, group_size: int) -> tuple[Tensor, Tensor]:
    """Scales [E, N, G] in the rule's scale_dtype and zeros uint8 [E, N, G] with the least e H_gg e^T in every group.

    weight: fp32 [E, N, K]. hessian: fp32 [E, K, K], of which the G blocks on the diagonal are read. Never worse, in
    that measure, than min-max scales, which are a candidate.
    """
    experts, rows, columns = weight.shape
    groups = columns // group_size
    square = hessian.unflatten(2, (groups, group_size)).unflatten(1, (groups, group_size))
    blocks = square.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()  # [E, G, g, g]
    scales = weight.new_empty((experts, rows, groups), dtype=rule.scale_dtype)
    zeros = torch.empty((experts, rows, groups), dtype=torch.uint8, device=weight.device)
    tall = max(1, ELEMENTS // (experts * columns))
    for row in range(0, rows, tall):
        part = weight[:, row : row + tall].unflatten(2, (groups, group_size)).transpose(1, 2).contiguous()
        scale, zero = _search(part, blocks, rule)  # [E, G, rows]
        scales[:, row : row + tall] = scale.mT.to(rule.scale_dtype)
        zeros[:, row : row + tall] = zero.mT.to(torch.uint8)
    return scales, zeros


def minmax_error(weight: Tensor, rule: GridRule, group_size: int) -> Tensor:
    """The error W - Q, fp32 [E, N, K], of RTN with min-max scales."""
    part = weight.unflatten(-1, (-1, group_size))
    scale, zero = grid_of(*span_of(part.amin(-1), part.amax(-1), rule), 1.0, rule)
    return _error(part, scale, zero, rule, torch.empty_like(part)).flatten(-2)


def searched_error(weight: Tensor, loss_weight: Tensor, rule: GridRule, group_size: int) -> Tensor:
    """The error W - Q, fp32 [E, N, K], of RTN with the scales that the kernels find for loss weights [E, K]."""
    scales, zeros = fit_grid(
        weight,
        loss_weight,
        bits=rule.bits,
        group_size=group_size,
        sym=rule.sym,
        search=True,
        scale_dtype=rule.scale_dtype,
    )
    part = weight.unflatten(-1, (-1, group_size))
    return _error(part, scales.float(), zeros.float(), rule, torch.empty_like(part)).flatten(-2)


def _search(part: Tensor, blocks: Tensor, rule: GridRule) -> tuple[Tensor, Tensor]:
    """fp32 scales and zeros [E, G, N] of groups [E, G, N, g]."""
    low, high = part.amin(-1), part.amax(-1)
    span, low = span_of(low, high, rule)
    scale, zero = grid_of(span, low, 1.0, rule)
    work = torch.empty_like(part)
    least = _loss(part, blocks, scale, zero, rule, work)
    span = negated(span, low, high, rule)
    for factor in span_factors(rule.bits)[1:]:
        trial, trial_zero = grid_of(span, low, factor, rule)
        loss = _loss(part, blocks, trial, trial_zero, rule, work)
        better = loss < least
        torch.where(better, loss, least, out=least)
        torch.where(better, trial, scale, out=scale)
        torch.where(better, trial_zero, zero, out=zero)
    return scale, zero


def _error(part: Tensor, scale: Tensor, zero: Tensor, rule: GridRule, work: Tensor) -> Tensor:
    """part - rounded part, of groups [..., g] with one scale and zero each, in the memory of `work`."""
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    return levels_of(part, scale, -zero, rule.top - zero, out=work).mul_(scale).sub_(part).neg_()


def _loss(part: Tensor, blocks: Tensor, scale: Tensor, zero: Tensor, rule: GridRule, work: Tensor) -> Tensor:
    error = _error(part, scale, zero, rule, work)
    return (error @ blocks).mul_(error).sum(-1)

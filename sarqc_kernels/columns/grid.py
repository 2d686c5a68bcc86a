"""Grids: which scale and zero a group of weights gets, and what its weights become on that grid.

A group is the weights of one row that share a scale s and an integer zero z; code c in 0 .. 2^bits - 1 stands for the
weight (c - z) * s. Everything here works on *tiles* [g, B, N]: the g members of a group first, then B blocks that have
an importance of their own (experts, or the groups of one matrix), then N rows. Members first means that every step is
one long contiguous vector operation and that sums run over the slowest axis. torch adds the last columns of such a
sum, those that do not fill LANES, in another order. So tiles are padded: the grid of a row is the same whatever rows
stand beside it.

The search scales the span of the min-max grid by every factor of `span_factors` and keeps the one with the least
importance-weighted squared error. Clipping a few outliers buys finer steps for the rest: at 2 to 4 bits this is worth
more than any other single choice in the solver. More bits clip less, so their factors stay closer to 1.

A symmetric grid has one code more below zero than above. If every scale is positive, it is always the large positive
weights that are clipped: all rows lose in the same direction, by far the most at 2 bits, where a layer then answers a
constant input with a constant and blocks add that up. So the search turns a grid around, with a scale below zero, where
a group's largest weight is positive: the code that is one more goes where it is needed, and errors have no direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "FitTile",
    "GridRule",
    "Problem",
    "empty_grid",
    "fit_by_tiles",
    "fit_grid",
    "fit_tile",
    "fit_tiles",
    "given_grid",
    "grid_of",
    "levels_of",
    "negated",
    "round_to_grid",
    "safe_scale",
    "span_factors",
    "span_of",
]

TRIALS = 24  # with 80 the loss is 0.1 to 0.3 % lower
WIDEST = 1.08  # a little beyond the span, where the largest weight lies nearer to its code

LANES = 64  # four vectors of the widest kind

TILE_ELEMENTS = 1 << 17  # elements in flight: a tile and its two work buffers stay in the second-level caches


def span_factors(bits: int) -> tuple[float, ...]:
    """Factors on the min-max span that the search tries; 1 comes first, and the first of equals wins."""
    lowest = min(0.7, max(0.4, 0.1 + bits / 10))
    step = (WIDEST - lowest) / (TRIALS - 2)
    return (1.0, *(WIDEST - step * trial for trial in range(TRIALS - 1)))


@dataclass(frozen=True)
class GridRule:
    """What a grid may be: the arguments that every fit shares."""

    bits: int
    sym: bool
    search: bool
    scale_dtype: torch.dtype

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The code of zero on a symmetric grid."""
        return 1 << (self.bits - 1)

    def storable(self, scale: Tensor) -> Tensor:
        """fp32 scales as `scale_dtype` will hold them: finite, and never smaller than its smallest normal number."""
        kept = torch.finfo(self.scale_dtype)
        size = scale.abs().clamp_(kept.tiny, kept.max).to(self.scale_dtype).float()
        return torch.where(scale < 0, -size, size)


class Problem(NamedTuple):
    """The request of `quantize_columns` to its implementations; the fields are its arguments."""

    weight: Tensor
    factor: Tensor
    order: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    group_size: int
    rule: GridRule


def empty_grid(weight: Tensor, group_size: int, rule: GridRule) -> tuple[Tensor, Tensor]:
    """Room for the grid of a weight [E, N, K]: scales in the dtype of the rule and zeros uint8, [E, N, G]."""
    shape = (*weight.shape[:2], weight.shape[2] // group_size)
    scales = torch.empty(shape, dtype=rule.scale_dtype, device=weight.device)
    return scales, torch.empty(shape, dtype=torch.uint8, device=weight.device)


def given_grid(problem: Problem) -> tuple[Tensor, Tensor]:
    """Scales and zeros that a solver returns: those given, or room for those fitted; zeros not given are the middle."""
    scales, zeros = empty_grid(problem.weight, problem.group_size, problem.rule)
    if problem.scales is not None:
        scales.copy_(problem.scales)
    if problem.zeros is not None:
        return scales, zeros.copy_(problem.zeros)
    return scales, zeros.fill_(problem.rule.middle)


def fit_grid(weight: Tensor, importance: Tensor | None, group_size: int, rule: GridRule) -> tuple[Tensor, Tensor]:
    """Reference of `sarqc_kernels.columns.fit_grid`."""
    return fit_by_tiles(weight, importance, group_size, rule, fit_tile)


FitTile = Callable[[Tensor, Tensor | None, GridRule], tuple[Tensor, Tensor]]
"""A function like `fit_tile`."""


def fit_by_tiles(
    weight: Tensor, importance: Tensor | None, group_size: int, rule: GridRule, fit: FitTile
) -> tuple[Tensor, Tensor]:
    """`fit_grid` with a given way to fit a tile."""
    scales, zeros = empty_grid(weight, group_size, rule)
    if not weight.numel():
        return scales, zeros
    (experts, rows, _), groups = weight.shape, scales.shape[2]
    tall = max(64, min(2048, TILE_ELEMENTS // group_size))  # rows in a tile: long vectors first,
    wide = max(1, TILE_ELEMENTS // (min(tall, rows) * group_size))  # then as many groups as fit
    for expert in range(experts):
        for first in range(0, groups, wide):
            at = slice(first, min(first + wide, groups))
            span = slice(at.start * group_size, at.stop * group_size)
            counts = None
            if importance is not None:
                counts = importance[expert, span].unflatten(0, (-1, group_size)).T.contiguous()
            for row in range(0, rows, tall):
                part = weight[expert, row : row + tall, span].T.contiguous()
                tile = part.unflatten(0, (-1, group_size)).transpose(0, 1).contiguous()
                scale, zero = fit(tile, counts, rule)
                scales[expert, row : row + tall, at] = scale.T.to(rule.scale_dtype)
                zeros[expert, row : row + tall, at] = zero.T.to(torch.uint8)
    return scales, zeros


def fit_tiles(groups: Tensor, importance: Tensor | None, rule: GridRule, scales: Tensor, zeros: Tensor) -> None:
    """`fit_tile` of [g, B, N], as many rows at a time as a tile may have, written into fp32 scales and zeros [B, N]."""
    tall = max(64, TILE_ELEMENTS // max(1, groups[..., 0].numel()))
    for row in range(0, groups.shape[2], tall):
        at = (..., slice(row, row + tall))
        scales[at], zeros[at] = fit_tile(groups[at], importance, rule)


def fit_tile(tile: Tensor, importance: Tensor | None, rule: GridRule) -> tuple[Tensor, Tensor]:
    """Scales and zeros, fp32 [B, N] both, of a tile [g, B, N] fp32 with importance [g, B] or None for all ones."""
    rows = tile.shape[-1]
    if rule.search and rows % LANES:
        tile = F.pad(tile, (0, -rows % LANES))
    low, high = tile.amin(0), tile.amax(0)
    span, low = span_of(low, high, rule)
    scale, zero = grid_of(span, low, 1.0, rule)
    if not rule.search:
        return scale, zero
    counts = None if importance is None else importance.unsqueeze(-1)
    work = (tile.new_empty(tile.shape), tile.new_empty(tile.shape))
    span = negated(span, low, high, rule)
    least = _loss(tile, counts, scale, zero, rule, work)
    for factor in span_factors(rule.bits)[1:]:
        trial, trial_zero = grid_of(span, low, factor, rule)
        loss = _loss(tile, counts, trial, trial_zero, rule, work)
        better = loss < least
        torch.where(better, loss, least, out=least)
        torch.where(better, trial, scale, out=scale)
        torch.where(better, trial_zero, zero, out=zero)
    return scale[:, :rows], zero[:, :rows]


def span_of(low: Tensor, high: Tensor, rule: GridRule) -> tuple[Tensor, Tensor]:
    """Width and lower end of what a min-max grid covers, given the least and the largest weight of groups."""
    if rule.sym:
        return torch.maximum(low.neg(), high), low
    low = low.clamp(max=0)
    return high.clamp(min=0) - low, low


def negated(span: Tensor, low: Tensor, high: Tensor, rule: GridRule) -> Tensor:
    """Spans as the search tries them: below zero where a symmetric grid has to reach further up than down."""
    return torch.where(high > -low, -span, span) if rule.sym else span


def grid_of(span: Tensor, low: Tensor, factor: float, rule: GridRule) -> tuple[Tensor, Tensor]:
    """The grid that covers `factor` times a span; asymmetric ones start at `factor * low`, which is at most 0.

    The scale of a span below zero is below zero too.
    """
    if rule.sym:
        return rule.storable(span * (2 * factor / rule.top)), torch.full_like(span, rule.middle)
    scale = rule.storable(span * (factor / rule.top))
    return scale, (low * -factor).div_(scale).round_().clamp_(0, rule.top)


def _loss(
    tile: Tensor, counts: Tensor | None, scale: Tensor, zero: Tensor, rule: GridRule, work: tuple[Tensor, Tensor]
) -> Tensor:
    """Weighted squared rounding error [B, N]. In units of the scale until the end, which saves a pass over the tile.

    Multiplying by 1 / scale may round a weight half-way between two codes to the other one; that changes no loss.
    """
    steps, error = work
    torch.mul(tile, scale.reciprocal(), out=steps)
    torch.round(steps, out=error)
    if rule.sym:
        error.clamp_(-rule.middle, rule.top - rule.middle)
    else:
        torch.clamp(error, -zero, rule.top - zero, out=error)
    error.sub_(steps)
    if counts is None:
        error.mul_(error)
        total = error.sum(0)
    else:
        torch.mul(error, counts, out=steps)
        total = steps.mul_(error).sum(0)
    return total.mul_(scale).mul_(scale)


def levels_of(values: Tensor, scale: Tensor, low: Tensor, high: Tensor, out: Tensor) -> Tensor:
    """Signed levels (code - zero) of fp32 values: round half even of value / scale, kept within low .. high.

    low is -zero and high is 2^bits - 1 - zero, both fp32; scale must not be 0. The division is IEEE's, so any
    implementation can reproduce the level exactly.
    """
    torch.div(values, scale, out=out).round_()
    return torch.clamp(out, low, high, out=out)


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Reference of `sarqc_kernels.columns.round_to_grid`."""
    experts, rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    if not weight.numel():
        return codes
    tall = max(1, TILE_ELEMENTS // columns)
    groups = scales.shape[-1]
    for expert in range(experts):
        for row in range(0, rows, tall):
            at = (expert, slice(row, row + tall))
            values = weight[at].unflatten(-1, (groups, -1))
            scale, zero = safe_scale(scales[at].float()).unsqueeze(-1), zeros[at].float().unsqueeze(-1)
            levels = levels_of(values, scale, -zero, (1 << bits) - 1 - zero, out=torch.empty_like(values))
            codes[at] = levels.add_(zero).flatten(-2).to(torch.uint8)
    return codes


def safe_scale(scale: Tensor) -> Tensor:
    """Scales to divide by: where one is 0 every code means 0, so 1 serves and no NaN arises."""
    return torch.where(scale == 0, 1.0, scale)

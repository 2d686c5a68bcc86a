"""`quantize_columns` in plain torch: the readable twin of every faster implementation.

Layout. Work is transposed and the experts stand side by side: buffers are [K, E, N], so a column of all rows of all
experts is one contiguous vector, and each step of the column loop is one vector operation for all of them.

Blocking. Let M' be M with every column divided by its diagonal element: p_j = w_j + sum_{i<j} delta_i M'_ij. The sum,
called `pull`, is built left-looking in three sizes: products for each panel (about 128 columns) bring in all columns
before the panel; inside it one small product per micro-panel (16 columns); inside that a rank-1 update per column. Only
the last is bound by memory, and it stays in cache.

Rows are taken in batches that bound the work buffers. A row's codes do not depend on which rows or experts share its
batch: every elementwise step is one IEEE operation, and sums are made of products of at most `DEPTH` terms, which BLAS
adds in order (`sarqc_kernels.products`). So C++ can have the same bits (`cpu_impl`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sarqc_kernels.columns.grid import GridRule, Problem, fit_tiles, given_grid, levels_of, safe_scale
from sarqc_kernels.products import columns_product

__all__ = ["DEPTH", "MICRO", "PANEL", "diagonal_of", "quantize_columns"]

PANEL = 128
MICRO = 16
DEPTH = 64
"""Most columns of one product: BLAS adds products of so few in the order of the columns, whatever else their shape."""
BATCH = 8192  # rows in flight, over all experts of a batch,
ELEMENTS = 1 << 25  # and fewer where their weights would be more than this many: the buffers take 9 bytes for each
LEAST_BATCH = 512  # rows; every batch divides the factor by its diagonal once more


@dataclass
class Work:
    """One batch of rows, transposed and in processing order. `given`: the grid comes from outside."""

    weight: Tensor  # fp32 [K, E, N]
    delta: Tensor  # fp32 [K, E, N]: w - q of the columns done
    codes: Tensor  # uint8 [K, E, N]
    scales: Tensor  # fp32 [G, E, N]; groups as the solver meets them, or in their own order if given
    zeros: Tensor  # fp32 [G, E, N]
    factor: Tensor  # fp32 [E, K, K]: M
    diagonal: Tensor  # fp32 [E, K]: diag(M), ones for an expert without a factor
    usable: Tensor  # bool [E]: whether the expert has a factor
    group_of: Tensor  # int64 [E, K]: group of each column in processing order
    group_size: int
    given: bool
    rule: GridRule


def quantize_columns(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `sarqc_kernels.columns.quantize_columns`."""
    weight, factor, order, scales, _, group_size, rule = problem
    experts, rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    out_scales, out_zeros = given_grid(problem)
    if order is None:
        order = torch.arange(columns, device=weight.device).expand(experts, columns)
    diagonal, usable = diagonal_of(factor)
    for some, span in _batches(experts, rows, columns):
        own = order[some]
        part = weight[some, span]
        work = Work(
            weight=_transposed(part, own),
            delta=weight.new_empty((columns, *part.shape[:2])),
            codes=torch.empty((columns, *part.shape[:2]), dtype=torch.uint8, device=weight.device),
            scales=safe_scale(out_scales[some, span].float().permute(2, 0, 1)).contiguous(),
            zeros=out_zeros[some, span].float().permute(2, 0, 1).contiguous(),
            factor=factor[some],
            diagonal=diagonal[some],
            usable=usable[some],
            group_of=own.div(group_size, rounding_mode="floor"),
            group_size=group_size,
            given=scales is not None,
            rule=rule,
        )
        _solve(work)
        for at in range(part.shape[0]):
            expert = some.start + at
            codes[expert, span] = work.codes[:, at].index_select(0, own[at].argsort()).T
            if scales is None:
                groups = work.group_of[at, ::group_size]
                out_scales[expert, span, groups] = work.scales[:, at].T.to(rule.scale_dtype)
                out_zeros[expert, span, groups] = work.zeros[:, at].T.to(torch.uint8)
    return codes, out_scales, out_zeros


def diagonal_of(factor: Tensor) -> tuple[Tensor, Tensor]:
    """diag(M) [E, K], ones for an expert without a factor, and whether it has one, bool [E]."""
    diagonal = factor.diagonal(dim1=1, dim2=2)
    usable = (diagonal.isfinite() & (diagonal > 0)).all(1)
    return torch.where(usable.unsqueeze(1), diagonal, 1.0), usable


def _batches(experts: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Slices of experts and of rows: several whole experts while they are small, else parts of one."""
    tall = min(BATCH, max(LEAST_BATCH, ELEMENTS // max(1, columns)))
    together = max(1, tall // max(1, rows))
    for first in range(0, experts, together):
        for row in range(0, rows, tall):
            yield slice(first, min(first + together, experts)), slice(row, min(row + tall, rows))


def _transposed(weight: Tensor, order: Tensor) -> Tensor:
    """[E, N, K] as [K, E, N] with the columns of every expert in its own order."""
    out = weight.new_empty((weight.shape[2], *weight.shape[:2]))
    for expert in range(weight.shape[0]):
        torch.index_select(weight[expert].T.contiguous(), 0, order[expert], out=out[:, expert])
    return out


def _solve(work: Work) -> None:
    """All columns of a batch, panel by panel. A panel holds whole groups, or lies inside of one."""
    columns, group_size = work.weight.shape[0], work.group_size
    if work.given:
        stretch, width = columns, PANEL  # groups do not matter: every column brings its grid
    elif group_size > PANEL:
        stretch, width = group_size, PANEL
    else:
        stretch = width = group_size * (PANEL // group_size)
    for begin in range(0, columns, stretch):
        end = min(begin + stretch, columns)
        if not work.given and group_size > PANEL:
            _fit(work, begin, _pull(work, _panel(work, begin, end), begin))
        for first in range(begin, end, width):
            _solve_panel(work, first, min(first + width, end))


def _panel(work: Work, first: int, last: int) -> Tensor:
    """Columns first .. last - 1 of M', down to their last row: [E, last, last - first]; 0 without a factor."""
    panel = work.factor[:, :last, first:last] / work.diagonal[:, None, first:last]
    return torch.where(work.usable[:, None, None], panel, 0.0)


def _pull(work: Work, panel: Tensor, first: int) -> Tensor:
    """The compensation that columns before `first` add to the panel's: [width, E, N]."""
    pull = panel.new_zeros((panel.shape[2], *work.weight.shape[1:]))
    for expert in range(pull.shape[1]):
        for begin in range(0, first, DEPTH):
            at = slice(begin, min(begin + DEPTH, first))
            pull[:, expert] += columns_product(panel[expert, at], work.delta[at, expert])
    return pull


def _fit(work: Work, first: int, pull: Tensor) -> None:
    """Grid of the group that begins at `first`, on the weights as all columns before it compensate them.

    pull: [g, E, N] from all of those. In units of M' the compensated group W_g + (Delta_{<g} M_{<g,g}) M_gg^-1 is
    W_g + pull M'_gg^-1 (here transposed): every pull goes back through the columns of its own group.
    """
    last = first + work.group_size
    group = work.weight[first:last]
    if first:
        inside = work.factor[:, first:last, first:last] / work.diagonal[:, None, first:last]
        inside = torch.where(work.usable[:, None, None], inside, 0.0)
        group = group + _settled(inside, pull)
    scales, zeros = (grid[first // work.group_size] for grid in (work.scales, work.zeros))
    fit_tiles(group, work.diagonal[:, first:last].T.square(), work.rule, scales, zeros)


def _settled(inside: Tensor, pull: Tensor) -> Tensor:
    """X [g, E, N] with inside^T X = pull, for unit upper triangles `inside` [E, g, g], in the order of the columns."""
    solved = pull.clone()
    coefficients = inside.permute(1, 2, 0).unsqueeze(-1)  # [i, j, E, 1]
    for start in range(0, len(pull), MICRO):
        stop = min(start + MICRO, len(pull))
        for i in range(start, stop - 1):
            solved[i + 1 : stop].addcmul_(coefficients[i, i + 1 : stop], solved[i], value=-1)
        for expert in range(pull.shape[1] if stop < len(pull) else 0):
            solved[stop:, expert] -= columns_product(inside[expert, start:stop, stop:], solved[start:stop, expert])
    return solved


def _solve_panel(work: Work, first: int, last: int) -> None:
    """Columns first .. last - 1: group by group where grids are fitted, each fit before its columns."""
    panel = _panel(work, first, last)
    pull = _pull(work, panel, first)
    inside = panel[:, first:].contiguous()
    fits = not work.given and work.group_size <= PANEL
    stretch = work.group_size if fits else last - first
    for begin in range(first, last, stretch):
        end = min(begin + stretch, last)
        if fits:
            _fit(work, begin, pull[begin - first : end - first])
        _solve_stretch(work, inside, pull, first, begin, end)


def _solve_stretch(work: Work, inside: Tensor, pull: Tensor, first: int, begin: int, end: int) -> None:
    """Columns begin .. end - 1 of the panel that begins at `first`: deltas and codes, micro-panel by micro-panel.

    inside: fp32 [E, P, P], M' between the panel's columns. pull: fp32 [P, E, N], what the columns before `begin` ask of
    the panel's; those from `end` on gain what these columns ask.
    """
    coefficients = inside.permute(1, 2, 0).unsqueeze(-1).contiguous()  # [i, j, E, 1]
    for start in range(begin, end, MICRO):
        stop = min(start + MICRO, end)
        own = slice(start - first, stop - first)
        _solve_micro(work, start, stop, pull[own], coefficients[own, own])
        if own.stop < len(pull):
            for expert in range(pull.shape[1]):
                coming = inside[expert, own, own.stop :]
                pull[own.stop :, expert] += columns_product(coming, work.delta[start:stop, expert])


def _solve_micro(work: Work, start: int, stop: int, pull: Tensor, coefficients: Tensor) -> None:
    """Columns start .. stop - 1 one by one. pull: [m, E, N], up to `start`; coefficients: [m, m, E, 1] of M'."""
    scales, zeros = _columns_grid(work, start, stop)
    levels = torch.empty_like(pull)
    value = torch.empty_like(pull[0])
    low, high = -zeros, work.rule.top - zeros
    rows = zip(work.weight[start:stop], work.delta[start:stop], pull, levels, scales, low, high)
    for column, (weight, delta, pulled, level, scale, least, most) in enumerate(rows):
        torch.add(weight, pulled, out=value)
        levels_of(value, scale, least, most, out=level)
        torch.mul(level, scale, out=value)
        torch.sub(weight, value, out=delta)
        if column + 1 < stop - start:
            pull[column + 1 :].addcmul_(coefficients[column, column + 1 :], delta)
    work.codes[start:stop] = levels.add_(zeros)


def _columns_grid(work: Work, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Scales and zeros [m, E, N] of columns start .. stop - 1."""
    if not work.given:
        at = start // work.group_size
        return (work.scales[at].expand(stop - start, -1, -1), work.zeros[at].expand(stop - start, -1, -1))
    index = work.group_of[:, start:stop].T.unsqueeze(-1).expand(-1, -1, work.weight.shape[2])
    return work.scales.gather(0, index), work.zeros.gather(0, index)

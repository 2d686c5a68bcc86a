"""The walk over panels that the device implementations share; they differ in the step that takes a panel's columns.

Layout. As in the reference, work is transposed and in processing order: buffers are [E, K, N], a column of all rows is
one contiguous vector, and a thread that owns a row reads and writes beside its neighbours.

Steps. With M undivided, p_j = w_j + (sum_{i<j} delta_i M_ij) / M_jj. For every panel, two launches:

    pull      the part of that sum from all columns before the panel: a GEMM, [panel, first] x [first, N] per expert
    columns   one program per tile of rows takes the panel's columns in turn and adds the part from inside the panel

What the fit of a group needs, the group as all columns before it compensate it, is the same recurrence with rounding
left out: where q_j = p_j the error is delta_j = -(sum) / M_jj, so a *free* pass leaves W - Delta = the compensated
group in place of a triangular solve. Groups within a panel are fitted inside of the columns' launch (free pass, fit,
rounding pass); one wider than a panel takes its panels free, is fitted in a launch of its own and takes them again.

Nothing here waits for the device. Per weight, 9 bytes of buffers; experts and rows go in batches that bound them.
Flops: N K^2 for the products (as much again for groups wider than a panel), N K PANEL inside the panels, and for a
search about 8 per weight and trial.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sarqc_kernels.columns.config import MICRO, PANEL
from sarqc_kernels.columns.grid import GridRule, Problem, given_grid, safe_scale, span_factors

__all__ = ["Action", "Steps", "Work", "batches", "factors_of", "plan", "quantize", "too_large", "too_many_groups"]

ELEMENTS = 1 << 28  # weights in flight: 2.3 GB of buffers
LEAST_ROWS = 4096  # of a batch: fewer would leave multiprocessors idle
WIDEST = (1 << 31) // LEAST_ROWS - 1  # columns: of a batch's matrix, kernels count elements in 32 bits
LAUNCH = 65_535  # programs on the second and third axis of a launch

Action = Literal["round", "fit", "free", "fit wide", "start"]
"""What happens to a stretch of columns: round on the grid that stands; fit its groups and round; leave rounding out;
fit the one group that it is from what a free pass left; or, before any rounding, that group is what it was."""


@dataclass
class Work:
    """One batch of rows of some experts. Columns are in processing order, groups in the weight's own."""

    weight: Tensor  # fp32 [E, K, N]
    delta: Tensor  # fp32 [E, K, N]: w - q of the columns done
    codes: Tensor  # uint8 [E, K, N]
    pull: Tensor  # fp32 [E, PANEL, N]: compensation of the columns before the panel
    ahead: Tensor  # fp32 [E, MICRO, N]: the same for a micro-panel, and from inside the panel
    scales: Tensor  # fp32 [E, G, N]
    zeros: Tensor  # fp32 [E, G, N]
    factor: Tensor  # fp32 [E, K, K]: M, each dense, any stride between experts
    usable: Tensor  # int32 [E]: 0 for an expert without a factor, of whose M nothing is read
    inverse: Tensor  # fp32 [E, K]: 1 / diag(M), 0 without a factor
    importance: Tensor  # fp32 [E, K]: diag(M)^2, 1 without a factor
    group_of: Tensor  # int32 [E, K]: group of each column
    group_size: int
    rule: GridRule

    @property
    def experts(self) -> int:
        """Experts in this batch."""
        return self.weight.shape[0]

    @property
    def columns(self) -> int:
        """K."""
        return self.weight.shape[1]

    @property
    def rows(self) -> int:
        """Rows in this batch."""
        return self.weight.shape[2]


class Steps(Protocol):
    """The steps of an implementation. Columns first .. last - 1 of all rows and experts; nothing waits."""

    def pull(self, work: Work, first: int, last: int) -> None:
        """work.pull[:, j - first] = sum over i < first of delta_i M_ij; 0 without a factor."""

    def columns(self, work: Work, first: int, last: int, action: Action) -> None:
        """Deltas, and unless the action is "free" codes; for "fit" grids too. Reads work.pull."""

    def fit(self, work: Work, first: int, last: int) -> None:
        """Grid of the one group that these columns are, from weight - delta."""


def plan(columns: int, group_size: int, given: bool) -> Iterator[tuple[Action, int, int]]:
    """The steps (action, first, last) in their order; every action but "start" and "fit wide" is one panel."""
    if given or group_size <= PANEL:
        width = PANEL if given else group_size * (PANEL // group_size)
        for first in range(0, columns, width):
            yield "round" if given else "fit", first, min(first + width, columns)
        return
    for begin in range(0, columns, group_size):
        end = begin + group_size
        panels = [(first, min(first + PANEL, end)) for first in range(begin, end, PANEL)]
        if begin:
            yield from (("free", *panel) for panel in panels)
        else:
            yield "start", begin, end
        yield "fit wide", begin, end
        yield from (("round", *panel) for panel in panels)


def quantize(steps: Steps, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """`sarqc_kernels.columns.quantize_columns` by an implementation's steps."""
    weight, factor, order, scales, _, group_size, rule = problem
    experts, rows, columns = weight.shape
    codes = torch.empty_like(weight, dtype=torch.uint8, memory_format=torch.contiguous_format)
    out_scales, out_zeros = given_grid(problem)
    if not weight.numel():
        return codes, out_scales, out_zeros
    factor = factor if factor.stride()[1:] == (columns, 1) else factor.contiguous()  # experts may share one
    for some, span in batches(experts, rows, columns):
        own = None if order is None else order[some]
        at = (some, span)
        work = _begin(weight[at], factor[some], own, out_scales[at], out_zeros[at], group_size, rule)
        for action, first, last in plan(columns, group_size, scales is not None):
            if action == "start":
                work.delta[:, first:last] = 0
            elif action == "fit wide":
                steps.fit(work, first, last)
            else:
                steps.pull(work, first, last)
                steps.columns(work, first, last, action)
        codes[at] = _reordered(work.codes, None if own is None else own.argsort(1)).mT
        if scales is None:
            out_scales[at] = work.scales.mT.to(rule.scale_dtype)
            out_zeros[at] = work.zeros.mT.to(torch.uint8)
    return codes, out_scales, out_zeros


def _begin(
    weight: Tensor,
    factor: Tensor,
    order: Tensor | None,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    rule: GridRule,
) -> Work:
    """Buffers of one batch; scales and zeros are what a given grid holds, or whatever where one will be fitted."""
    experts, rows, columns = weight.shape
    diagonal = factor.diagonal(dim1=1, dim2=2)
    usable = (diagonal.isfinite() & (diagonal > 0)).all(1)
    diagonal = torch.where(usable.unsqueeze(1), diagonal, 1.0)
    column = torch.arange(columns, device=weight.device).expand(experts, columns) if order is None else order
    weight = weight.mT.contiguous()
    return Work(
        weight=_reordered(weight, order),
        delta=torch.empty_like(weight),
        codes=torch.empty_like(weight, dtype=torch.uint8),
        pull=weight.new_empty((experts, PANEL, rows)),
        ahead=weight.new_empty((experts, MICRO, rows)),
        scales=safe_scale(scales.float()).mT.contiguous(),
        zeros=zeros.float().mT.contiguous(),
        factor=factor,
        usable=usable.int(),
        inverse=torch.where(usable.unsqueeze(1), diagonal.reciprocal(), 0.0),
        importance=diagonal.square(),
        group_of=column.div(group_size, rounding_mode="floor").int().contiguous(),
        group_size=group_size,
        rule=rule,
    )


def _reordered(columns: Tensor, order: Tensor | None) -> Tensor:
    """[E, K, N] with the columns of every expert in the order [E, K], None for as they are."""
    return columns if order is None else columns.gather(1, order.unsqueeze(-1).expand(-1, -1, columns.shape[2]))


def batches(experts: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Slices of experts and of rows: several whole experts while they are small, else parts of one."""
    tall = max(LEAST_ROWS, ELEMENTS // max(columns, PANEL))
    together = min(max(1, tall // rows), LAUNCH)
    for first in range(0, experts, together):
        for row in range(0, rows, tall):
            yield slice(first, min(first + together, experts)), slice(row, min(row + tall, rows))


def too_large(columns: int) -> str | None:
    """Why the matrices of one expert are too large; None where they are not. `batches` sees to the other sizes."""
    if columns <= WIDEST:
        return None
    return f"{columns} columns are more than {WIDEST}: elements of {LEAST_ROWS} rows are counted in 32 bits"


def too_many_groups(columns: int, group_size: int) -> str | None:
    """Why a launch with a row of programs for each group cannot be made; None where it can."""
    groups = columns // group_size
    return None if groups <= LAUNCH else f"{groups} groups of a row are more than the {LAUNCH} of a launch"


@functools.cache
def factors_of(bits: int, sym: bool, device: torch.device) -> Tensor:
    """fp32 [trials, 2] of the search: what a span is multiplied by to give the scale, and minus the factor.

    Rounded to fp32 on the host as the reference's Python numbers are; kept, so that only the first call copies it.
    """
    top = (1 << bits) - 1
    pairs = [((2 * factor if sym else factor) / top, -factor) for factor in span_factors(bits)]
    return torch.tensor(pairs, dtype=torch.float32, device=device)

"""Who does what: windows for each rank to run, and matrices for each rank to solve. The same answer on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sarqc.errors import ArgumentError
from sarqc.model.sites import SiteChunk

SOLVE_BYTES = {"cpu": 1 << 29, "cuda": 1 << 33}
"""Bytes that solving takes at a time: a CPU gains nothing by solving many matrices side by side."""

Batches = list[tuple[slice, int]]
"""Windows of each micro-batch, and the fold they belong to."""


def partition_batches(batches: Batches, folds: int, size: int) -> list[Batches]:
    """The micro-batches of each of `size` ranks: of every fold a stretch, in the order of ranks.

    Whole micro-batches are dealt, so that each is what it would be in one process. `ArgumentError` where a fold has
    fewer of them than there are ranks.
    """
    by_fold = [[batch for batch in batches if batch[1] == fold] for fold in range(folds)]
    fewest = min(map(len, by_fold))
    if fewest < size:
        raise ArgumentError(
            f"{size} ranks cannot share {fewest} micro-batches (the text has {folds} parts, and every rank "
            "needs some of each): use fewer ranks, more --num-samples or a smaller --micro-batch"
        )
    return [
        [batch for part in by_fold for batch in part[rank * len(part) // size : (rank + 1) * len(part) // size]]
        for rank in range(size)
    ]


def positions(batches: Batches) -> Tensor:
    """Numbers of the windows in some micro-batches, int64, in their order."""
    return torch.cat([torch.arange(windows.start, windows.stop) for windows, _ in batches])


def renumbered(batches: Batches) -> Batches:
    """The same micro-batches where no others are: their windows counted from 0."""
    renumbered: Batches = []
    start = 0
    for windows, fold in batches:
        stop = start + windows.stop - windows.start
        renumbered.append((slice(start, stop), fold))
        start = stop
    return renumbered


@dataclass(frozen=True)
class WorkItem:
    """What one rank solves. number: of the chunk. owner: the rank. chunk: these experts alone. rows: of a dense layer,
    where ranks split it; rows do not depend on each other."""

    number: int
    chunk: SiteChunk
    owner: int
    rows: slice | None = None


def cost(chunk: SiteChunk) -> float:
    """What solving takes: K^3 / 3 for the factor and N K^2 for the columns, for each expert."""
    columns, rows = chunk.site.in_features, chunk.site.rows
    return (chunk.stop - chunk.first) * (columns**3 / 3 + rows * columns**2)


def solving_bytes(chunk: SiteChunk, gram: bool) -> int:
    """Bytes that solving a chunk at once takes beside its block and its Grams; gram: whether it has any.

    Five matrices of a Gram's size are alive at once (its mean, the metric, that in the solver's order, the factor and
    its workspace) and six of the weight's, of which RTN needs four.
    """
    columns, rows = chunk.site.in_features, chunk.site.rows
    return (chunk.stop - chunk.first) * (
        5 * 4 * columns**2 + 6 * 4 * rows * columns if gram else 4 * 4 * rows * columns
    )


def work_items(chunks: Sequence[SiteChunk], size: int, device: torch.device, *, gram: bool) -> list[WorkItem]:
    """All chunks, cut between experts where a chunk is too much for one of `size` ranks or takes more memory than there
    is for solving on such a device; each item with its owner. One expert always fits; gram: as in `solving_bytes`.

    Pieces of a chunk are of nearly equal length and follow each other. A dense layer is cut between rows.
    """
    if size > 1 and gram and len(chunks) == 1 and chunks[0].site.experts == 1:
        count = chunks[0].site.rows
        edges = [rank * count // size for rank in range(size + 1)]
        stretches = [slice(first, stop) for first, stop in pairwise(edges)]
        return [WorkItem(0, chunks[0], owner, rows) for owner, rows in enumerate(stretches) if rows.start < rows.stop]
    least = sum(map(cost, chunks)) / (2 * size)  # half of what is due to a rank, so that the rest can even out
    items: list[tuple[int, SiteChunk]] = []
    for number, chunk in enumerate(chunks):
        count = chunk.stop - chunk.first
        due = round(cost(chunk) / least) if size > 1 else 1
        fitting = max(1, SOLVE_BYTES[device.type] * count // solving_bytes(chunk, gram))
        parts = min(count, max(1, due, -(-count // fitting)))
        edges = [chunk.first + part * count // parts for part in range(parts + 1)]
        items += [(number, SiteChunk(chunk.site, first, stop)) for first, stop in pairwise(edges)]
    owners = partition([cost(chunk) for _, chunk in items], size)
    return [WorkItem(number, chunk, owner) for (number, chunk), owner in zip(items, owners)]


def partition(costs: Sequence[float], size: int) -> list[int]:
    """The rank of each task: the dearest first, each to whoever has least so far; ties go to the lower number."""
    loads = [0.0] * size
    owners = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        rank = loads.index(min(loads))
        owners[task] = rank
        loads[rank] += costs[task]
    return owners

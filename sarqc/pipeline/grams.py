"""Statistics of what sites are handed, summed over micro-batches, folds and ranks, in portions that fit a byte budget.

A Gram takes K^2 floats for every expert and fold. What does not fit the budget at once is summed in a further portion,
while all micro-batches wait where they are; sites are cut between experts, so one expert is the least that must fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sarqc.config import MethodConfig
from sarqc.errors import NumericError
from sarqc.method.gram import MAX_LOST, Statistics, all_finite, finite_rows
from sarqc.model.sites import Site, SiteChunk
from sarqc.pipeline.comm import Comm, exchange, one_rank_at_a_time
from sarqc.system import range_advice


@dataclass(frozen=True)
class Rows:
    """The inputs of a site in one micro-batch: x [T, K], with offsets int64 [E + 1] where rows are sorted by expert.
    residual: [T, N], the error of the stream behind it, where the site corrects that."""

    site: Site
    fold: int
    x: Tensor
    offsets: Tensor | None = None
    residual: Tensor | None = None


Source = Callable[[], Iterator[Rows]]
"""Goes through this rank's micro-batches, fold after fold; may be called again."""


def gram_bytes(chunk: SiteChunk, folds: int) -> int:
    """Bytes of the Grams of a chunk."""
    return _each(chunk.site, folds) * (chunk.stop - chunk.first)


def _each(site: Site, folds: int) -> int:
    return 4 * folds * site.in_features * (site.in_features + site.cross_rows)


def portions(sites: Sequence[Site], folds: int, budget: int) -> Iterator[list[SiteChunk]]:
    """Shares of the sites, as many at a time as have Grams that fit the budget; one expert always does."""
    portion: list[SiteChunk] = []
    room = budget
    for site in sites:
        each = _each(site, folds)
        first = 0
        while first < site.experts:
            fitting = site.experts - first if not each else min(site.experts - first, room // each)
            if fitting <= 0 and portion:
                yield portion
                portion, room = [], budget
                continue
            stop = first + max(fitting, 1)
            portion.append(SiteChunk(site, first, stop))
            room -= each * (stop - first)
            first = stop
    if portion:
        yield portion


class Collector:
    """Sums statistics of sites on one rank or many."""

    def __init__(self, method: MethodConfig, folds: int, device: torch.device, dtype: torch.dtype, comm: Comm) -> None:
        self.folds = folds
        self._dtype = dtype
        self._method = method
        self._device = device
        self._comm = comm

    def collect(self, chunks: Sequence[SiteChunk], source: Source) -> tuple[list[Statistics], list[str]]:
        """Statistics of every chunk over all ranks, and a line for each that is not of all rows.

        The micro-batches are gone through once, and once more where rows hold NaN or Inf. Raises `NumericError` naming
        the chunk where those are more than 1 %, `torch.OutOfMemoryError` on all ranks where one runs out.
        """
        kept, finite = self._all_ranks(chunks, source, None)
        if all(finite):
            return kept, []
        del kept  # their memory is needed once more
        lost = [0] * len(chunks)
        kept, finite = self._all_ranks(chunks, source, lost)
        lost = [sum(counts) for counts in zip(*self._comm.all_gather_object(lost))]
        notes = []
        for chunk, statistics, count, sound in zip(chunks, kept, lost, finite):
            rows = count + sum(int(fold.rows.sum()) for fold in statistics.folds)
            what = f"the inputs of {chunk.name}{' or the stream behind it' if chunk.site.residual_write else ''}"
            where = f"{count} of {rows} rows of {what} hold NaN or Inf on the calibration text"
            if count > MAX_LOST * rows or not sound:
                raise NumericError(f"{where}; up to {MAX_LOST:.0%} are left out: {range_advice(self._dtype)}")
            if count:
                notes.append(f"{where}: left out")
        return kept, notes

    def _all_ranks(
        self, chunks: Sequence[SiteChunk], source: Source, lost: list[int] | None
    ) -> tuple[list[Statistics], list[bool]]:
        """Sums of every rank, added up afterwards, or in order as they are made; and whether those of a chunk are
        finite."""

        own = partial(self._own, chunks, source, lost)

        def checked(kept: list[Statistics]) -> tuple[list[Statistics], list[bool]]:
            return kept, list(map(_finite, kept))

        comm = self._comm
        if comm.ordered:
            kept = one_rank_at_a_time(comm, own)
            comm.broadcast(self._sums(kept), comm.size - 1)
            kept, finite = exchange(comm, partial(checked, kept))
        else:
            kept, finite = exchange(comm, lambda: checked(own()))
            comm.all_reduce(self._sums(kept))
        return kept, list(map(all, zip(*finite)))

    def _sums(self, kept: Sequence[Statistics]) -> list[Tensor]:
        return [tensor for statistics in kept for fold in range(self.folds) for tensor in statistics.tensors(fold)]

    def _own(self, chunks: Sequence[SiteChunk], source: Source, lost: list[int] | None) -> list[Statistics]:
        """This rank's micro-batches; with `lost`, rows that are not finite are left out and counted there, by chunk."""
        kept = [self._empty(chunk) for chunk in chunks]
        sums = [[tensor for one in kept for tensor in one.tensors(fold)] for fold in range(self.folds)]
        fold = 0
        if self._comm.ordered:
            self._comm.recv_previous(sums[0])
        for rows in source():
            while fold < rows.fold:
                fold = self._next_fold(sums, fold)
            for number, (chunk, statistics) in enumerate(zip(chunks, kept)):
                if chunk.site is rows.site:
                    left_out = _add(chunk, statistics, rows, finite=lost is not None)
                    if lost is not None:
                        lost[number] += left_out
        while fold < self.folds:
            fold = self._next_fold(sums, fold)
        return kept

    def _next_fold(self, sums: Sequence[Sequence[Tensor]], fold: int) -> int:
        """End a fold, and take over the next one where ranks sum in turn."""
        if self._comm.ordered:
            self._comm.send_next(sums[fold])
            if fold + 1 < self.folds:
                self._comm.recv_previous(sums[fold + 1])
        return fold + 1

    def _empty(self, chunk: SiteChunk) -> Statistics:
        """Statistics of a chunk that have seen nothing."""
        return Statistics.zeros(
            chunk.stop - chunk.first,
            chunk.site.in_features,
            self.folds,
            self._device,
            rest=self._method.expert_shrinkage > 0 and not chunk.whole,
            cross_rows=chunk.site.cross_rows,
        )


def _add(chunk: SiteChunk, statistics: Statistics, rows: Rows, *, finite: bool) -> int:
    """Add rows to a chunk's statistics, with `finite` only those that are; how many were left out."""
    x, bounds, residual, left_out = rows.x, rows.offsets, rows.residual, 0
    if finite:
        # A row and its residual are stacked, so that they go or stay together.
        stacked, bounds = finite_rows(x if residual is None else torch.cat([x, residual], -1), bounds)
        left_out = len(x) - len(stacked)
        x, residual = stacked[:, : x.shape[-1]], None if residual is None else stacked[:, x.shape[-1] :]
    if bounds is not None and not chunk.whole:
        first, last = bounds[chunk.first], bounds[chunk.stop]
        statistics.add_rest(x[:first], rows.fold)
        statistics.add_rest(x[last:], rows.fold)
        x, bounds = x[first:last], bounds[chunk.first : chunk.stop + 1] - first
    statistics.add(x, bounds, rows.fold, residual=residual)
    return left_out


def _finite(statistics: Statistics) -> bool:
    # A sum of magnitudes is finite exactly if everything in it is: no pass over the activations is needed. The cross
    # Gram can overflow where they do not.
    grams = (*statistics.folds, *statistics.rest)
    sums = [gram.abs_sum for gram in grams] + [gram.cross_gram for gram in grams if gram.cross_gram is not None]
    return all(map(all_finite, sums))

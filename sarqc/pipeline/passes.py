"""Statistics of a block's sites, in as many passes of the text as their Grams need room for.

A Gram takes K^2 floats for every expert and fold. What does not fit the byte budget at once waits for a further pass;
sites are cut between experts, so one expert of one site is the least that must fit. A site that writes to the residual
stream also sees the stream there, and what the original's was there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sarqc.config import MethodConfig
from sarqc.errors import NumericError
from sarqc.method.gram import MAX_LOST, Statistics, finite_rows, shortening
from sarqc.model.lazy_model import Skeleton
from sarqc.model.residual import through
from sarqc.model.sites import Share, Site, observe
from sarqc.pipeline.activations import States
from sarqc.pipeline.comm import SINGLE_PROCESS, Comm, in_turn, synchronize_oom


def gram_bytes(share: Share, folds: int) -> int:
    """Bytes of the Grams of a share."""
    return _each(share.site, folds) * (share.stop - share.first)


def _each(site: Site, folds: int) -> int:
    return 4 * folds * site.in_features * (site.in_features + site.cross_rows)


def passes(sites: Sequence[Site], folds: int, budget: int) -> Iterator[list[Share]]:
    """Portions of the sites whose Grams fit the budget; one expert always does."""
    portion: list[Share] = []
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
            portion.append(Share(site, first, stop))
            room -= each * (stop - first)
            first = stop
    if portion:
        yield portion


def collect(
    skeleton: Skeleton,
    index: int,
    shares: Sequence[Share],
    states: States,
    method: MethodConfig,
    device: torch.device,
    comm: Comm = SINGLE_PROCESS,
) -> tuple[list[Statistics], list[str]]:
    """Statistics of every share of block `index`, which is loaded, and a line for each that is not of all rows.

    One pass of all ranks' windows through the block; a second one where rows hold NaN or Inf. Raises
    `NumericError` naming the share where those are more than 1 %.
    """
    kept = _all_ranks(skeleton, index, shares, states, method, device, None, comm)
    if all(_each_finite(kept, comm)):
        return kept, []
    del kept  # their memory is needed for the second pass
    lost = [0] * len(shares)
    kept = _all_ranks(skeleton, index, shares, states, method, device, lost, comm)
    lost = [sum(counts) for counts in zip(*comm.all_gather_object(lost))]
    notes = []
    for share, statistics, count, sound in zip(shares, kept, lost, _each_finite(kept, comm)):
        rows = count + sum(int(fold.rows.sum()) for fold in statistics.folds)
        what = f"the inputs of {share.name}{' or the stream behind it' if share.site.residual_write else ''}"
        where = f"{count} of {rows} rows of {what} hold NaN or Inf on the calibration text"
        if count > MAX_LOST * rows or not sound:
            raise NumericError(f"{where}; up to {MAX_LOST:.0%} are left out: look at the model, its dtype or the text")
        if count:
            notes.append(f"{where}: left out")
    return kept, notes


def _each_finite(kept: Sequence[Statistics], comm: Comm) -> list[bool]:
    return synchronize_oom(comm, lambda: list(map(_finite, kept)))


def _finite(statistics: Statistics) -> bool:
    # A sum of magnitudes is finite exactly if everything in it is: no pass over the activations is needed. What is
    # the residual error can overflow where they do not.
    grams = (*statistics.folds, *statistics.rest)
    sums = [gram.abs_sum for gram in grams] + [gram.cross_gram for gram in grams if gram.cross_gram is not None]
    return all(bool(torch.isfinite(each).all()) for each in sums)


def _all_ranks(
    skeleton: Skeleton,
    index: int,
    shares: Sequence[Share],
    states: States,
    method: MethodConfig,
    device: torch.device,
    lost: list[int] | None,
    comm: Comm,
) -> list[Statistics]:
    """A pass on every rank, and what they saw together: added up afterwards, or in order as they see it."""

    def attempt() -> list[Statistics]:
        return _one_pass(skeleton, index, shares, states, method, device, lost, comm)

    kept = in_turn(comm, attempt) if comm.ordered else synchronize_oom(comm, attempt)
    for sums in (statistics.tensors(fold) for statistics in kept for fold in range(states.folds)):
        if comm.ordered:
            comm.broadcast(sums, comm.size - 1)
        else:
            comm.all_reduce(sums)
    return kept


def _one_pass(
    skeleton: Skeleton,
    index: int,
    shares: Sequence[Share],
    states: States,
    method: MethodConfig,
    device: torch.device,
    lost: list[int] | None,
    comm: Comm,
) -> list[Statistics]:
    """This rank's windows once; with `lost`, rows that are not finite are left out and counted there, by share."""
    kept = [_empty(share, states.folds, method, device) for share in shares]
    fold = 0
    waiting: list[tuple[Site, Tensor]] = []

    def sink(site: Site, x: Tensor, offsets: Tensor | None) -> None:
        if site.residual_write:
            waiting.append((site, x))  # for the stream behind it
        else:
            take(site, x, offsets, None)

    def take(site: Site, x: Tensor, offsets: Tensor | None, cross_gram: Tensor | None) -> None:
        for number, (share, statistics) in enumerate(zip(shares, kept)):
            if share.site is not site:
                continue
            own, bounds, residual = x, offsets, cross_gram
            if lost is not None:
                # A row and its residual error are stacked, so that they go or stay together.
                stacked, bounds = finite_rows(own if cross_gram is None else torch.cat([own, cross_gram], -1), bounds)
                lost[number] += len(own) - len(stacked)
                own, residual = stacked[:, : own.shape[-1]], None if cross_gram is None else stacked[:, own.shape[-1] :]
            if bounds is not None and not share.whole:
                first, last = bounds[share.first], bounds[share.stop]
                statistics.add_rest(own[:first], fold)
                statistics.add_rest(own[last:], fold)
                own, bounds = own[first:last], bounds[share.first : share.stop + 1] - first
            statistics.add(own, bounds, fold, cross_gram=residual)

    sites = list(dict.fromkeys(share.site for share in shares))
    reader = next((site.residual_write.reader for site in sites if site.residual_write), None)
    for fold in range(states.folds):
        sums = [tensor for statistics in kept for tensor in statistics.tensors(fold)]
        if comm.ordered:
            comm.recv_previous(sums)
        for hidden, original in states.of_fold(fold):
            with observe(skeleton, sites, sink, method.router_weight_power):
                _, stream = through(skeleton, index, reader, hidden.to(device))
            while waiting:
                assert original is not None
                site, x = waiting.pop()
                held = shortening(x, stream.shape[1])
                take(site, x * held, None, _drift(original.to(device), stream).mul_(held))
        if comm.ordered:
            comm.send_next(sums)
    return kept


def _empty(share: Share, folds: int, method: MethodConfig, device: torch.device) -> Statistics:
    """Statistics of a share that have seen nothing."""
    return Statistics.zeros(
        share.stop - share.first,
        share.site.in_features,
        folds,
        device,
        rest=method.expert_shrinkage > 0 and not share.whole,
        cross_rows=share.site.cross_rows,
    )


def _drift(original: Tensor, stream: Tensor) -> Tensor:
    """What each row of `stream` [B, L, H] lacks of the original's, [B * L, H].

    The first token of a window is asked for nothing: in most models it carries activations thousands of times those of
    the others, so that its drift would drown theirs, and it is what all others rest their attention on.
    """
    lacking = original - stream  # exact in their own dtype where they are within a factor of two of each other
    lacking[:, 0] = 0
    return lacking.flatten(0, 1)

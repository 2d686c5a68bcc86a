"""Statistics of a block's sites, in as many passes of the text as their Grams need room for.

A Gram takes K^2 floats for every expert and fold. What does not fit the byte budget at once waits for a further pass;
sites are cut between experts, so one expert of one site is the least that must fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sarqc.errors import NumericError
from sarqc.method.rows import MAX_LOST, finite_rows
from sarqc.method.statistics import Statistics
from sarqc.model.sites import Share, Site, observe
from sarqc.model.skeleton import Skeleton
from sarqc.model.states import States


def gram_bytes(share: Share, folds: int) -> int:
    """Bytes of the Grams of a share."""
    return 4 * folds * share.site.in_features**2 * (share.stop - share.first)


def passes(sites: Sequence[Site], folds: int, budget: int) -> Iterator[list[Share]]:
    """Portions of the sites whose Grams fit the budget; sites are cut between experts. One expert always fits."""
    portion: list[Share] = []
    room = budget
    for site in sites:
        each = 4 * folds * site.in_features**2
        first = 0
        while first < site.experts:
            fitting = site.experts - first if not each else min(site.experts - first, room // each)
            if fitting == 0 and portion:
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
    skeleton: Skeleton, index: int, shares: Sequence[Share], states: States, device: torch.device
) -> tuple[list[Statistics], list[str]]:
    """Statistics of every share of block `index`, which is loaded, and a line for each that is not of all rows.

    One pass of all windows through the block; a second one where rows hold NaN or Inf. Raises `NumericError` naming
    the share where those are more than 1 %.
    """
    kept = _one_pass(skeleton, index, shares, states, device, None)
    if all(map(_finite, kept)):
        return kept, []
    del kept  # their memory is needed for the second pass
    lost = [0] * len(shares)
    kept = _one_pass(skeleton, index, shares, states, device, lost)
    notes = []
    for share, statistics, count in zip(shares, kept, lost):
        rows = count + sum(int(fold.rows.sum()) for fold in statistics.folds)
        where = f"{count} of {rows} rows of the inputs of {share.name} hold NaN or Inf on the calibration text"
        if count > MAX_LOST * rows or not _finite(statistics):
            raise NumericError(f"{where}; up to {MAX_LOST:.0%} are left out: look at the model, its dtype or the text")
        if count:
            notes.append(f"{where}: left out")
    return kept, notes


def _finite(statistics: Statistics) -> bool:
    # A sum of magnitudes is finite exactly if everything in it is: no pass over the activations is needed.
    return all(bool(torch.isfinite(fold.abs_sum).all()) for fold in statistics.folds)


def _one_pass(
    skeleton: Skeleton,
    index: int,
    shares: Sequence[Share],
    states: States,
    device: torch.device,
    lost: list[int] | None,
) -> list[Statistics]:
    """All windows once; with `lost`, rows that are not finite are left out and counted there, by share."""
    kept = [Statistics.zeros(s.stop - s.first, s.site.in_features, states.folds, device) for s in shares]
    fold = 0

    def sink(site: Site, x: Tensor, offsets: Tensor | None) -> None:
        for number, (share, statistics) in enumerate(zip(shares, kept)):
            if share.site is not site:
                continue
            own, bounds = x, offsets
            if offsets is not None and share.stop - share.first < site.experts:
                bounds = offsets[share.first : share.stop + 1]
                own, bounds = x[bounds[0] : bounds[-1]], bounds - bounds[0]
            if lost is not None:
                before = len(own)
                own, bounds = finite_rows(own, bounds)
                lost[number] += before - len(own)
            statistics.add(own, bounds, fold)

    with observe(skeleton, list(dict.fromkeys(share.site for share in shares)), sink):
        for windows, fold in states.batches:  # noqa: B007 (the sink reads it)
            skeleton.call_block(index, states.hidden[windows].to(device))
    return kept

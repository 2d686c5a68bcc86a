"""What a block's inputs leave behind: statistics of its sites, from passes of all windows through it.

Where sites are to make up for earlier errors, the original model's hidden states go through the unquantized block
beside the quantized model's; what both feed a site meets there, micro-batch by micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sarqc.errors import NumericError
from sarqc.method.statistics import Statistics
from sarqc.model.sites import Share, Site, observe
from sarqc.model.skeleton import Skeleton
from sarqc.spec import SolveSpec


@dataclass
class States:
    """Hidden states [S, L, H] on the host, with the windows of each micro-batch and the fold they belong to.

    original: those of the unquantized model, where sites are to make up for the difference.
    """

    hidden: Tensor
    original: Tensor | None
    batches: list[tuple[slice, int]]
    folds: int


def passes(sites: Sequence[Site], folds: int, budget: int, *, cross: bool) -> Iterator[list[Share]]:
    """Portions of the sites whose Grams fit the budget; sites are cut between experts. One expert always fits.

    cross: whether dense sites have a second matrix, for what the original model feeds them.
    """
    portion: list[Share] = []
    room = budget
    for site in sites:
        each = 4 * folds * site.in_features**2 * (2 if cross and site.experts == 1 else 1)
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


def gather(
    skeleton: Skeleton,
    index: int,
    shares: Sequence[Share],
    states: States,
    solve: SolveSpec,
    device: torch.device,
    *,
    last: bool,
) -> list[Statistics]:
    """Statistics of every share, from one pass of all windows through block `index`, which is loaded on `device`.

    last: of the passes through this block; it moves the original model's hidden states on. Raises `NumericError`
    naming a site whose inputs are not finite.
    """
    kept = [_empty(share, states.folds, solve, device) for share in shares]
    fold = 0
    originals: dict[str, Tensor] = {}

    def remember(site: Site, x: Tensor, offsets: Tensor | None) -> None:
        if offsets is None:
            originals[site.name] = x

    def sink(site: Site, x: Tensor, offsets: Tensor | None) -> None:
        for share, statistics in zip(shares, kept):
            if share.site is not site:
                continue
            if offsets is None or share.whole:
                statistics.add(x, offsets, fold, original=originals.pop(site.name, None))
                continue
            own = offsets[share.first : share.stop + 1]
            statistics.add(x[own[0] : own[-1]], own - own[0], fold)
            statistics.add_rest(x[: own[0]], fold)
            statistics.add_rest(x[own[-1] :], fold)

    sites = list(dict.fromkeys(share.site for share in shares))
    for windows, fold in states.batches:  # noqa: B007 (the sink reads it)
        if states.original is not None:
            with observe(skeleton, sites, remember):
                leaving = skeleton.call_block(index, states.original[windows].to(device))
            if last:
                states.original[windows].copy_(leaving)
        with observe(skeleton, sites, sink):
            skeleton.call_block(index, states.hidden[windows].to(device))
    for share, statistics in zip(shares, kept):
        # A sum of magnitudes is finite exactly if everything in it is: no pass over the activations is needed.
        if not all(bool(torch.isfinite(fold.abs_sum).all()) for fold in statistics.folds):
            raise NumericError(f"the inputs of {share.name} hold NaN or Inf on the calibration text")
    return kept


def _empty(share: Share, folds: int, solve: SolveSpec, device: torch.device) -> Statistics:
    """Statistics of a share that have seen nothing."""
    return Statistics.zeros(
        share.stop - share.first,
        share.site.in_features,
        folds,
        device,
        rest=solve.borrow > 0 and not share.whole,
        cross=solve.carry_error and share.site.experts == 1,
    )

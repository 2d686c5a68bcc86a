"""Statistics of every site of a model as it is, collected once, so that many methods can be tried on them.

Every block sees the *unquantized* blocks before it: unlike a run of `blocks.run`, what one method does to a block has
no say in what another is given, and one pass serves all. Sums add up, so a longer text extends the statistics of a
shorter one that it begins with: text of several sizes costs one pass over the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sarqc.config import GRAM_BUDGET
from sarqc.errors import NumericError
from sarqc.method.gram import Statistics
from sarqc.model.layers import Targets
from sarqc.model.lazy_model import Skeleton
from sarqc.model.sites import Share, Site, find_sites, observe
from sarqc.model.source import TensorSource
from sarqc.pipeline import stream
from sarqc.pipeline.activations import PROBE_TOKENS, cut, windows_at_once
from sarqc.pipeline.passes import passes


@torch.no_grad()
def collect(
    skeleton: Skeleton,
    source: TensorSource,
    found: Targets,
    tokens: Tensor,
    sizes: Sequence[int],
    *,
    folds: int,
    gram_budget: int = GRAM_BUDGET,
) -> Iterator[tuple[int, int, dict[Share, Statistics]]]:
    """Yields (block, size, statistics by share) for each block and each size, of the first `size` windows.

    tokens: int64 [S, L]. sizes: rising, the last at most S. folds: each stretch from one size to the next is cut into
    so many parts, and fold f is the f-th part of them all. gram_budget: bytes; experts beyond it come in a further
    pass, so that a block and size may come several times with other shares. What is yielded grows as the loop goes on:
    keep nothing of it. What a share's other experts saw (`Statistics.rest`) is not in it: it is in their shares. Needs
    `load_outer`. Raises `NumericError` naming a site whose inputs are not finite.
    """
    hidden = stream.enter(skeleton, tokens[: sizes[-1]])
    skeleton.prepare(1, min(PROBE_TOKENS, tokens.shape[1]))
    step = windows_at_once(skeleton.device, tokens.shape[1])
    batches = {size: cut(size, step, folds, first) for first, size in pairwise([0, *sizes])}
    for index in range(len(skeleton.blocks)):
        skeleton.load_block(index, source, skeleton.device, skeleton.dtype)
        probe = hidden[:1, :PROBE_TOKENS].to(skeleton.device)
        sites = find_sites(skeleton, index, found.of_block(index), probe)
        portions = list(passes(sites, folds, gram_budget))
        for number, shares in enumerate(portions, start=1):
            last = number == len(portions)
            for size, kept in _observe(skeleton, index, shares, hidden, batches, folds, last=last):
                yield index, size, kept
        skeleton.unload_block(index)


def _observe(
    skeleton: Skeleton,
    index: int,
    shares: Sequence[Share],
    hidden: Tensor,
    batches: dict[int, list[tuple[slice, int]]],
    folds: int,
    *,
    last: bool,
) -> Iterator[tuple[int, dict[Share, Statistics]]]:
    """One pass of all windows through a block; the last pass also moves the hidden states on."""
    kept = {s: Statistics.zeros(s.stop - s.first, s.site.in_features, folds, skeleton.device) for s in shares}
    by_site = {share.site: share for share in shares}  # a portion holds one stretch of a site at most
    fold = 0

    def sink(site: Site, x: Tensor, offsets: Tensor | None) -> None:
        share = by_site[site]
        if offsets is not None and not share.whole:
            x = x[offsets[share.first] : offsets[share.stop]]
            offsets = offsets[share.first : share.stop + 1] - offsets[share.first]
        kept[share].add(x, offsets, fold)

    with observe(skeleton, list(by_site), sink):
        for size, parts in batches.items():
            for windows, fold in parts:  # noqa: B007 (the sink reads it)
                leaving = skeleton.call_block(index, hidden[windows].to(skeleton.device))
                if last:
                    hidden[windows].copy_(leaving)
            for share, statistics in kept.items():
                if not all(bool(torch.isfinite(gram.abs_sum).all()) for gram in statistics.folds):
                    raise NumericError(f"the inputs of {share.name} hold NaN or Inf on the calibration text")
            yield size, kept

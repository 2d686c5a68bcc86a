"""A first look at a model: what it would suffer from each site at each width, before any weight is quantized.

Errors of different sites have no common unit of their own: 1 % of what a softmax is made of is not 1 % of what an MLP
adds. They have one where they meet, in the hidden states that leave the block. So each site alone is rounded plainly
and the block run once more: how far that moves the hidden states of each token, relative to what they are, is what the
next norm passes on. Times what the solver loses at a width, relative to that rounding (`sarqc.method.widths`), this is
the site's loss. `benchmarks/quality/MIXED.md` has how well it predicts the loss of the model, and what else was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sarqc.errors import ArgumentError
from sarqc.method.widths import WidthLosses, tried, width_losses
from sarqc.model.passes import collect, passes
from sarqc.model.sites import Share, Site, find_sites, stack, write_back
from sarqc.model.skeleton import Skeleton
from sarqc.model.solving import scale_dtype
from sarqc.model.source import TensorSource
from sarqc.model.states import GLANCE, States, cut, enter
from sarqc.model.targets import Targets
from sarqc.spec import QuantSpec, SolveSpec

TOKENS = 1 << 14
"""Tokens of the calibration text, at most, that are looked at."""
FOLDS = 2


@dataclass(frozen=True)
class SiteLosses:
    """site: its name. linears, shapes: of its members, by the checkpoint's names. modules: of the model, that they are
    in. moved: mean over tokens of |change|^2 / |state|^2 of what leaves the block, from the rounding that was tried.
    losses: by width, in the same unit."""

    site: str
    linears: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    modules: tuple[str, ...]
    moved: float
    losses: dict[int, float]


@torch.no_grad()
def look(
    skeleton: Skeleton,
    source: TensorSource,
    found: Targets,
    tokens: Tensor,
    quant: QuantSpec,
    solve: SolveSpec,
    *,
    device: torch.device,
    dtype: torch.dtype,
    micro_batch: Callable[[int], int],
    gram_budget: int,
    mine: Callable[[int], bool] = lambda _: True,
    on_block: Callable[[int], object] = lambda _: None,
) -> Iterator[tuple[int, SiteLosses]]:
    """Yields (block, losses) of every site, block by block; blocks that are not `mine` are only run through.

    tokens: int64 [S, L]; of windows evenly spaced, at most 2^14 tokens are looked at. micro_batch(L): windows at once.
    gram_budget: bytes of Grams at
    once, as in `blocks.run`. Only one block is in memory, and beside it at most a copy of one of its sites.
    """
    windows = _evenly(tokens)
    solve = replace(solve, carry_error=False)
    batches = cut(len(windows), micro_batch(windows.shape[1]), FOLDS)
    states = enter(skeleton, source, windows, batches, FOLDS, device=device, dtype=dtype)
    for index in range(len(skeleton.blocks)):
        on_block(index)
        skeleton.load_block(index, source, device, dtype)
        if mine(index):
            for site in _block(skeleton, source, index, found, states, quant, solve, gram_budget):
                yield index, site
        states.move_on(lambda hidden, index=index: skeleton.call_block(index, hidden), device)
        skeleton.unload_block(index)


def _evenly(tokens: Tensor) -> Tensor:
    """Evenly spaced windows of at most `TOKENS` tokens together, two at least: one alone is cut in two."""
    count = min(len(tokens), max(FOLDS, TOKENS // tokens.shape[1]))
    windows = tokens[torch.linspace(0, len(tokens) - 1, count).round().long()]
    if len(windows) >= FOLDS:
        return windows
    half = tokens.shape[1] // FOLDS
    if not half:
        raise ArgumentError("one window of one token is too little to measure losses on: give more calibration text")
    return windows[:, : FOLDS * half].reshape(FOLDS, half)


def _block(
    skeleton: Skeleton,
    source: TensorSource,
    index: int,
    found: Targets,
    states: States,
    quant: QuantSpec,
    solve: SolveSpec,
    gram_budget: int,
) -> Iterator[SiteLosses]:
    """The sites of a block that is loaded."""
    device = skeleton.device
    sites = find_sites(skeleton, index, found.of_block(index), states.hidden[:1, :GLANCE].to(device))
    solved: dict[str, WidthLosses] = {}
    for shares in passes(sites, FOLDS, gram_budget, solve):
        collected, _ = collect(skeleton, index, shares, states, solve, device)
        for share, statistics in zip(shares, collected):
            weight = share.weight(skeleton.model)
            kept = scale_dtype(source, share.site)
            own = width_losses(share.name, weight, statistics, quant, solve, kept)
            solved[share.site.name] = solved[share.site.name] + own if share.site.name in solved else own
    entering = [states.hidden[windows].to(device) for windows in _tried_on(states)]
    leaving = [skeleton.call_block(index, hidden) for hidden in entering]
    for site in sites:
        moved = _moved(skeleton, source, index, site, quant, entering, leaving)
        yield SiteLosses(
            site=site.name,
            linears=tuple(target.linear for target in site.members),
            shapes=tuple(target.shape for target in site.members),
            modules=tuple(dict.fromkeys(target.module for target in site.members)),
            moved=moved,
            losses={width: moved * loss for width, loss in solved[site.name].relative().items()},
        )


def _tried_on(states: States) -> list[slice]:
    """The micro-batch in the middle of each fold."""
    by_fold = [[windows for windows, of in states.batches if of == fold] for fold in range(FOLDS)]
    return [part[len(part) // 2] for part in by_fold]


def _moved(
    skeleton: Skeleton,
    source: TensorSource,
    index: int,
    site: Site,
    quant: QuantSpec,
    entering: list[Tensor],
    leaving: list[Tensor],
) -> float:
    """Round a site plainly, run the block, put the weights back: what that does to what leaves the block."""
    originals = {name: stack(skeleton.model, name).clone() for name, _, _ in site.slabs}
    kept = scale_dtype(source, site)
    for expert in range(site.experts):
        share = Share(site, expert, expert + 1)
        for target, part in site.split(tried(share.weight(skeleton.model), quant, kept), expert):
            write_back(skeleton.model, target, part)
    shares = []
    for hidden, expected in zip(entering, leaving):
        change = (skeleton.call_block(index, hidden).float() - expected.float()).square().sum(-1)
        shares.append((change / expected.float().square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)).mean())
    for name, original in originals.items():
        stack(skeleton.model, name).copy_(original)
    return float(torch.stack(shares).mean())

"""Sensitivity analysis: the loss of the model from each site at each bit-width, before any weight is quantized.

Errors of different sites have no common unit: 1 % of the input of a softmax is not 1 % of the output of an MLP. They
have one at the end of the model. So each site alone is quantized at one bit-width, and a few sequences run on from
there to the logits. The mean KL divergence of the next token, times the solver's loss at another bit-width relative to
that one (`method.bit_allocation`), is the loss of the site. Divergences of independent errors add up while they are
small. `benchmarks/quality/MIXED.md` has the alternatives: RTN in place of the solver misjudges the sites that matter
most.

One block is in memory at a time. The hidden states of these few sequences wait between two blocks, one copy for every
site so far, and all go through the next block: half the blocks for each site, on average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sarqc.config import MethodConfig, QuantConfig
from sarqc.errors import ArgumentError
from sarqc.method.bit_allocation import LossByBits, loss_by_bits, probe_bits, probe_weight
from sarqc.method.gram import Statistics
from sarqc.method.lambda_search import LambdaSearch
from sarqc.method.weight import QuantizedWeight
from sarqc.model.layers import Target, Targets
from sarqc.model.lazy_model import Skeleton
from sarqc.model.perplexity import Tally
from sarqc.model.sites import Share, Site, find_sites, stack, write_back
from sarqc.model.source import TensorSource
from sarqc.pipeline.activations import States, cut, enter
from sarqc.pipeline.comm import SINGLE_PROCESS
from sarqc.pipeline.passes import collect
from sarqc.pipeline.quantize_site import SiteQuantizer, scale_dtype
from sarqc.pipeline.work_split import pieces
from sarqc.pipeline.workbench import Workbench

TOKENS = 1 << 14
"""Largest number of calibration tokens that sites are observed on."""
FOLDS = 2
TRIED_WINDOWS, TRIED_LENGTH = 2, 256
"""Sequences that each site is probed on, and tokens of each."""


@dataclass(frozen=True)
class SiteSensitivity:
    """Losses of one site.

    Attributes:
        site: Its name.
        linears: Its members, by the checkpoint's names.
        shapes: Their shapes.
        modules: The modules of the model that hold them.
        divergence: Mean KL divergence of the next token, in nats, at the probe's bit-width.
        losses: The same at each bit-width.
    """

    site: str
    linears: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    modules: tuple[str, ...]
    divergence: float
    losses: dict[int, float]


@dataclass
class _Trial:
    """A site that was probed in block `block`. solved: relative losses by bit-width. hidden: [B, L, H] on the host, the
    probe sequences as they leave the last block so far.
    """

    block: int
    site: Site
    solved: dict[int, float]
    hidden: Tensor

    def result(self, divergence: float) -> SiteSensitivity:
        return SiteSensitivity(
            site=self.site.name,
            linears=tuple(target.linear for target in self.site.members),
            shapes=tuple(target.shape for target in self.site.members),
            modules=tuple(dict.fromkeys(target.module for target in self.site.members)),
            divergence=divergence,
            losses={width: divergence * loss for width, loss in self.solved.items()},
        )


@torch.no_grad()
def measure_sensitivity(
    skeleton: Skeleton,
    source: TensorSource,
    found: Targets,
    tokens: Tensor,
    quant: QuantConfig,
    method: MethodConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    micro_batch: Callable[[int], int],
    gram_budget: int,
    seed: int = 0,
    mine: Callable[[int], bool] = lambda _: True,
    on_block: Callable[[int], object] = lambda _: None,
) -> list[tuple[int, SiteSensitivity]]:
    """(block, losses) of every site in the order of blocks; of blocks that are not `mine` nothing.

    tokens: int64 [S, L]; of windows evenly spaced, at most 2^14 tokens are observed. micro_batch(L): windows at once.
    gram_budget: bytes of Grams at once, as in `blocks.run`; where memory runs out there is less at once, as there.
    Beside a block there is at most a copy of one of its sites on the device.
    """
    windows = _evenly(tokens)
    batches = cut(len(windows), micro_batch(windows.shape[1]), FOLDS)
    states = enter(skeleton, source, windows, batches, FOLDS, device=device, dtype=dtype)
    few = windows[:: -(-len(windows) // TRIED_WINDOWS), :TRIED_LENGTH]
    skeleton.load_outer(source, device, dtype)
    skeleton.prepare(*few.shape)
    plain = skeleton.embed(few).cpu()
    skeleton.unload_outer()
    solving = SiteQuantizer(skeleton, source, quant, method, device, LambdaSearch(seed=seed), SINGLE_PROCESS)
    work = Workbench(
        skeleton, source, method, device, dtype, gram_budget, lambda *_: None, None, solving, SINGLE_PROCESS, None
    )
    trials: list[_Trial] = []
    for index in range(len(skeleton.blocks)):
        on_block(index)
        work.load(index)
        trying = partial(_begin, work, index, found, states, plain)
        begun = work.with_memory(index, states, trying) if mine(index) else []
        for hidden in (plain, *(trial.hidden for trial in trials)):
            hidden.copy_(skeleton.call_block(index, hidden.to(device)))
        trials += begun
        with work.stage(index, "replay"):
            work.with_memory(index, states, partial(states.move_on, partial(skeleton.call_block, index), device))
        skeleton.unload_block(index)
    skeleton.load_outer(source, device, dtype, head=True)
    expected = _logits(skeleton, plain)
    results = []
    for trial in trials:
        tally = Tally()
        for window, own, reference in zip(few, _logits(skeleton, trial.hidden), expected):
            tally.add(own[:-1], window[1:].to(device), reference[:-1])
        results.append((trial.block, trial.result(tally.kl)))
    skeleton.unload_outer()
    return results


def _evenly(tokens: Tensor) -> Tensor:
    """Evenly spaced windows of at most `TOKENS` tokens together, two at least: one alone is cut in two."""
    count = min(len(tokens), max(FOLDS, TOKENS // tokens.shape[1]))
    windows = tokens[torch.linspace(0, len(tokens) - 1, count).round().long()]
    if len(windows) < FOLDS:
        half = tokens.shape[1] // FOLDS
        windows = windows[:, : FOLDS * half].reshape(FOLDS, half)
    if windows.shape[1] < 2:
        raise ArgumentError(f"{tokens.numel()} tokens are too few to measure losses on: give more calibration text")
    return windows


def _begin(work: Workbench, index: int, found: Targets, states: States, plain: Tensor) -> list[_Trial]:
    """A trial of each site of a block that is loaded, through that block."""
    skeleton, quant = work.skeleton, work.solving.quant
    sites = find_sites(skeleton, index, found.of_block(index), states.probe().to(work.device))
    losses: dict[str, LossByBits] = {}
    weights: dict[str, list[tuple[Target, QuantizedWeight]]] = {site.name: [] for site in sites}
    for shares in work.portions(sites, FOLDS):
        for share, own, solved in _portion(work, index, shares, states):
            name = share.site.name
            losses[name] = losses[name] + own if name in losses else own
            weights[name] += solved
    width = probe_bits(quant)
    return [
        _Trial(index, site, losses[site.name].relative(width), _tried(skeleton, index, site, weights[site.name], plain))
        for site in sites
    ]


_Solved = tuple[Share, LossByBits, list[tuple[Target, QuantizedWeight]]]


def _portion(work: Workbench, index: int, shares: Sequence[Share], states: States) -> list[_Solved]:
    """Losses of each share, and its probe weights; their Grams are freed when this returns."""
    with work.stage(index, "observe"):
        collected, _ = collect(work.skeleton, index, shares, states, work.method, work.device)
    with work.stage(index, "solve"):
        return [_share(work, share, statistics) for share, statistics in zip(shares, collected)]


def _share(work: Workbench, share: Share, statistics: Statistics) -> _Solved:
    """The losses of a share, and its members on the host, solved a piece at a time: as in a run."""
    model, how = work.skeleton.model, (work.solving.quant, work.method, scale_dtype(work.source, share.site))
    losses = loss_by_bits(share.name, share.weight(model), statistics, *how, work.solving.lambda_search.seed)
    statistics.merge_folds()
    solved: list[tuple[Target, QuantizedWeight]] = []
    for piece in pieces([share], 1, work.device, gram=True):
        own, experts = piece.share, slice(piece.share.first - share.first, piece.share.stop - share.first)
        weight = probe_weight(share.name, own.weight(model), statistics, *how, experts)
        solved += share.site.split(weight.to("cpu"), own.first)
    return share, losses, solved


def _tried(
    skeleton: Skeleton, index: int, site: Site, weights: list[tuple[Target, QuantizedWeight]], plain: Tensor
) -> Tensor:
    """What leaves the block, on the host, with these weights in a site's place; its own are put back."""
    originals = {name: stack(skeleton.model, name).clone() for name, _, _ in site.slabs}
    for target, weight in weights:
        write_back(skeleton.model, target, weight)
    leaving = skeleton.call_block(index, plain.to(skeleton.device)).cpu()
    for name, original in originals.items():
        stack(skeleton.model, name).copy_(original)
    return leaving


def _logits(skeleton: Skeleton, hidden: Tensor) -> list[Tensor]:
    """Logits [L, V] of each window."""
    return [skeleton.finish(window[None].to(skeleton.device))[0] for window in hidden]

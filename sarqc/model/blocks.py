"""Quantize block by block: load, observe, solve, replay. A generator: it yields, and writes and prints nothing.

Only one block's weights are in memory at a time. Hidden states of all windows wait on the host; a block reads them,
and after its weights are quantized runs once more over them, so that the next block is calibrated on what it will see.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from sarqc.errors import ArgumentError, ModelError, NumericError
from sarqc.method.solve import SolveReport, error_cost, solve_site
from sarqc.method.statistics import Gram, Statistics
from sarqc.method.weight import QuantizedWeight
from sarqc.model.absorb import find_folds
from sarqc.model.rescale import BlockScales
from sarqc.model.sites import Share, Site, find_sites, observe, separate_sites, write_back
from sarqc.model.skeleton import Skeleton
from sarqc.model.source import TensorSource
from sarqc.model.targets import Target, Targets, check_group_size, targets
from sarqc.spec import QuantSpec, SolveSpec

TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 8192}
"""Tokens of a micro-batch: few enough for a CPU's caches, enough to fill a GPU."""
GRAM_BUDGET = 16 << 30
_GLANCE = 8
"""Tokens of the forward in which sites are found."""

OnProgress = Callable[[int, str], None]


@dataclass(frozen=True)
class BlockResult:
    """weights: by the checkpoint's names, without ".weight"; E = 1, on the CPU. reports: one for each solve.
    seconds: of each stage (load, observe, scale, solve, replay). changed: tensors that are not quantized and took up
    channel scales (norms, routers, biases), on the CPU; they replace the checkpoint's own, by its names, in its dtypes.
    """

    index: int
    weights: dict[str, QuantizedWeight]
    reports: list[SolveReport]
    seconds: dict[str, float]
    changed: dict[str, Tensor] = field(default_factory=dict)


Recall = Callable[[int, Sequence[Share]], list[Statistics]]
"""recall(block, shares): what is known of the inputs of these shares, one `Statistics` for each."""


@torch.no_grad()
def run(
    skeleton: Skeleton,
    source: TensorSource,
    tokens: Tensor | None,
    quant: QuantSpec,
    solve: SolveSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    micro_batch: int | None = None,
    folds: int = 1,
    gram_budget: int = GRAM_BUDGET,
    recall: Recall | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[BlockResult]:
    """Quantize every block of `skeleton` in order.

    tokens: int64 [S, L] windows to calibrate on; None only where `solve.gram` is False, and then nothing is run
    forward. dtype: of weights and hidden states on the way, the skeleton's by default. micro_batch: windows at once,
    by default as many as hold 1024 tokens on a CPU, 8192 on a GPU. folds: stretches of the windows whose Grams are
    kept apart. gram_budget: bytes for Grams at a time; experts beyond it are observed in further passes. recall: has
    the statistics already; `tokens` are then only looked at to see which layers read what, a few of them will do.

    Scales get the dtype the checkpoint stores the weight in; bf16 where that is neither bf16 nor fp16, because it
    keeps fp32's range. Raises `NumericError` naming the layer where weights or activations are not finite.
    """
    found = targets(skeleton, quant)
    check_group_size(found, quant)
    work = _Work(skeleton, source, quant, solve, torch.device(device), dtype, on_progress or (lambda *_: None), recall)
    states = None
    if solve.gram:
        if tokens is None or tokens.dim() != 2 or not 1 <= folds <= len(tokens):
            shape = None if tokens is None else list(tokens.shape)
            raise ArgumentError(f"tokens = {shape} with folds = {folds}: give [windows, length], a window per fold")
        states = _embed(work, tokens, micro_batch or max(1, TOKENS_AT_ONCE[work.device.type] // tokens.shape[1]), folds)
    for index in range(len(skeleton.blocks)):
        yield _run_block(work, index, found, states, gram_budget)


@dataclass
class _Work:
    skeleton: Skeleton
    source: TensorSource
    quant: QuantSpec
    solve: SolveSpec
    device: torch.device
    dtype: torch.dtype | None
    on_progress: OnProgress
    recall: Recall | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def cost(self, share: Share, gram: Gram) -> Tensor:
        """What errors in a share's weight cost, for the scale search."""
        return error_cost(share.name, gram, self.quant, self.solve)

    @contextmanager
    def stage(self, index: int, name: str) -> Iterator[None]:
        """Announce a stage and add its wall time to `seconds`."""
        self.on_progress(index, name)
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


@dataclass
class _States:
    """Hidden states [S, L, H] on the host, with the windows of each micro-batch and the fold they belong to."""

    hidden: Tensor
    batches: list[tuple[slice, int]]
    folds: int


def _embed(work: _Work, tokens: Tensor, micro_batch: int, folds: int) -> _States:
    """Hidden states entering block 0; whatever shapes will be replayed are recorded on the way."""
    skeleton = work.skeleton
    count, length = tokens.shape
    skeleton.load_outer(work.source, work.device, work.dtype)
    edges = [fold * count // folds for fold in range(folds + 1)]
    batches = [
        (slice(start, min(start + micro_batch, stop)), fold)
        for fold, (first, stop) in enumerate(pairwise(edges))
        for start in range(first, stop, micro_batch)
    ]
    hidden = torch.empty(0)
    for windows, _ in batches:
        skeleton.prepare(windows.stop - windows.start, length)
        entering = skeleton.embed(tokens[windows])
        if not len(hidden):
            shape = (count, *entering.shape[1:])
            hidden = torch.empty(shape, dtype=entering.dtype, pin_memory=work.device.type == "cuda")
        hidden[windows].copy_(entering)
    skeleton.prepare(1, min(_GLANCE, length))
    skeleton.unload_outer()
    if not bool(torch.isfinite(hidden).all()):
        raise NumericError("the embeddings of the calibration tokens hold NaN or Inf; repair the checkpoint")
    return _States(hidden, batches, folds)


def _run_block(work: _Work, index: int, found: Targets, states: _States | None, gram_budget: int) -> BlockResult:
    skeleton, members = work.skeleton, found.of_block(index)
    work.seconds = {}
    with work.stage(index, "load"):
        skeleton.load_block(index, work.source, work.device, work.dtype)
        _check_weights(skeleton, members)
        if states is None:
            sites = separate_sites(skeleton, members)
        else:
            glance = states.hidden[:1, :_GLANCE].to(work.device)
            sites = find_sites(skeleton, index, members, glance)
    weights: dict[str, QuantizedWeight] = {}
    reports: list[SolveReport] = []
    portions = list(_passes(sites, states.folds if states else 0, gram_budget))
    scales, collected = None, None
    if work.solve.channel_scale and states is not None:
        scales, collected = _scale(work, index, sites, portions, states)
    for shares in portions:
        if states is not None and not collected:
            with work.stage(index, "observe"):
                collected = _observe(work, index, shares, states)
        with work.stage(index, "solve"):
            for share in shares:
                statistics = collected.pop(0) if collected else None
                reports.append(_solve(work, share, statistics, scales, weights))
    lost = [target.linear for target in members if target.linear not in weights]
    if lost:
        raise ModelError(f"{lost[0]} was targeted and came out unquantized ({len(lost)} such layers)")
    changed = scales.fold_in() if scales else {}
    if states is not None and index + 1 < len(skeleton.blocks):
        with work.stage(index, "replay"):
            for target in members:
                write_back(skeleton.model, target, weights[target.linear])
            _replay(work, index, states)
    skeleton.unload_block(index)
    ordered = {target.linear: weights[target.linear] for target in members}
    return BlockResult(index, ordered, reports, dict(work.seconds), changed)


def _scale(
    work: _Work, index: int, sites: Sequence[Site], portions: Sequence[Sequence[Share]], states: _States
) -> tuple[BlockScales, list[Statistics] | None]:
    """The channel scales of a block, all before any of its weights is quantized, because scales end up in weights of
    other sites; and the statistics, where those of all sites fit at once and need not be collected again."""
    with work.stage(index, "scale"):
        glance = states.hidden[:1, :_GLANCE].to(work.device)
        folds, reasons = find_folds(work.skeleton, index, sites, glance)
        scales = BlockScales(work.skeleton, work.source, sites, folds, reasons)
    collected: list[Statistics] = []
    for shares in portions:
        with work.stage(index, "observe"):
            collected = _observe(work, index, shares, states)
        with work.stage(index, "scale"):
            grams = [statistics.total() for statistics in collected]
            scales.decide(shares, grams, work.cost, work.quant, _scale_dtype(work, shares[0].site))
    return scales, collected if len(portions) == 1 else None


def _check_weights(skeleton: Skeleton, members: Sequence[Target]) -> None:
    """`NumericError` naming the first targeted layer with a weight that is not finite."""
    for parameter in dict.fromkeys(target.parameter for target in members):
        weight = skeleton.model.get_parameter(parameter)
        if bool(torch.isfinite(weight).all()):
            continue
        stack = weight if weight.dim() == 3 else weight[None]
        for target in members:
            rows = stack[target.expert, target.start : target.start + target.shape[0]]
            if target.parameter == parameter and not bool(torch.isfinite(rows).all()):
                raise NumericError(f"{target.linear}.weight holds NaN or Inf; repair the checkpoint before quantizing")


def _passes(sites: Sequence[Site], folds: int, budget: int) -> Iterator[list[Share]]:
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


def _observe(work: _Work, index: int, shares: Sequence[Share], states: _States) -> list[Statistics]:
    """Statistics of every share, recalled or from one pass of all windows through the block."""
    if work.recall:
        return work.recall(index, shares)
    kept = [Statistics.zeros(s.stop - s.first, s.site.in_features, states.folds, work.device) for s in shares]
    fold = 0

    def sink(site: Site, x: Tensor, offsets: Tensor | None) -> None:
        for share, statistics in zip(shares, kept):
            if share.site is not site:
                continue
            if offsets is None or share.stop - share.first == site.experts:
                statistics.add(x, offsets, fold)
            else:
                own = offsets[share.first : share.stop + 1]
                statistics.add(x[own[0] : own[-1]], own - own[0], fold)

    with observe(work.skeleton, list(dict.fromkeys(share.site for share in shares)), sink):
        for windows, fold in states.batches:  # noqa: B007 (the sink reads it)
            work.skeleton.call_block(index, states.hidden[windows].to(work.device))
    for share, statistics in zip(shares, kept):
        # A sum of magnitudes is finite exactly if everything in it is: no pass over the activations is needed.
        if not all(bool(torch.isfinite(fold.abs_sum).all()) for fold in statistics.folds):
            raise NumericError(f"the inputs of {share.name} hold NaN or Inf on the calibration text")
    return kept


def _solve(
    work: _Work,
    share: Share,
    statistics: Statistics | None,
    scales: BlockScales | None,
    weights: dict[str, QuantizedWeight],
) -> SolveReport:
    """Quantize one share and add its members to `weights`."""
    weight, dtype = share.weight(work.skeleton.model), _scale_dtype(work, share.site)
    scaling = scales.of(share) if scales else None
    solved, report = solve_site(
        share.name, weight, statistics, work.quant, work.solve, scale_dtype=dtype, scaling=scaling
    )
    for target, part in share.site.split(solved, share.first):
        weights[target.linear] = QuantizedWeight(part.codes.cpu(), part.scales.cpu(), part.zeros.cpu(), part.bits)
    return report


def _scale_dtype(work: _Work, site: Site) -> torch.dtype:
    stored = work.source.dtype(f"{site.members[0].linear}.weight")
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16


def _replay(work: _Work, index: int, states: _States) -> None:
    """Move the hidden states on through the quantized block."""
    for windows, _ in states.batches:
        states.hidden[windows].copy_(work.skeleton.call_block(index, states.hidden[windows].to(work.device)))
    if not bool(torch.isfinite(states.hidden).all()):
        raise NumericError(f"what leaves {work.skeleton.prefix}.{index} holds NaN or Inf on the calibration text")

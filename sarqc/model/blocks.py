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
from sarqc.method.pooling import borrowing
from sarqc.method.solve import SolveReport, choose_strength, error_cost, solve_site
from sarqc.method.statistics import Statistics
from sarqc.method.strength import Choice, Strengths
from sarqc.method.weight import QuantizedWeight
from sarqc.model.absorb import find_folds
from sarqc.model.gather import States, gather, passes
from sarqc.model.rescale import BlockScales
from sarqc.model.sites import Share, Site, find_sites, separate_sites, write_back
from sarqc.model.skeleton import Skeleton
from sarqc.model.source import TensorSource
from sarqc.model.targets import Target, Targets, check_group_size, targets
from sarqc.spec import AUTO, QuantSpec, SolveSpec

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
    folds: int | None = None,
    gram_budget: int = GRAM_BUDGET,
    strengths: Strengths | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[BlockResult]:
    """Quantize every block of `skeleton` in order.

    tokens: int64 [S, L] windows to calibrate on; None only where `solve.gram` is False, and then nothing is run
    forward. dtype: of weights and hidden states on the way, the skeleton's by default. micro_batch: windows at once,
    by default as many as hold 1024 tokens on a CPU, 8192 on a GPU. folds: stretches of the windows whose Grams are
    kept apart, by default two halves where a strength has to be chosen. gram_budget: bytes for Grams at a time; experts
    beyond it are observed in further passes. strengths: what blocks that are done already have said about strengths.

    Scales get the dtype the checkpoint stores the weight in; bf16 where that is neither bf16 nor fp16, because it
    keeps fp32's range. Raises `NumericError` naming the layer where weights or activations are not finite.
    """
    found = targets(skeleton, quant)
    check_group_size(found, quant)
    announce = on_progress or (lambda *_: None)
    work = _Work(skeleton, source, quant, solve, torch.device(device), dtype, announce, strengths or Strengths())
    states = None
    if solve.gram:
        folds = folds or (min(2, len(tokens)) if tokens is not None and solve.strength == AUTO else 1)
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
    strengths: Strengths
    choices: dict[str, Choice] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, index: int, name: str) -> Iterator[None]:
        """Announce a stage and add its wall time to `seconds`."""
        self.on_progress(index, name)
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def _embed(work: _Work, tokens: Tensor, micro_batch: int, folds: int) -> States:
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
    return States(hidden, hidden.clone() if work.solve.carry_error else None, batches, folds)


def _run_block(work: _Work, index: int, found: Targets, states: States | None, gram_budget: int) -> BlockResult:
    skeleton, members = work.skeleton, found.of_block(index)
    work.seconds, work.choices = {}, {}
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
    portions = list(passes(sites, states.folds if states else 0, gram_budget, cross=work.solve.carry_error))
    scales, collected = None, None
    if work.solve.channel_scale and states is not None:
        scales, collected = _scale(work, index, sites, portions, states)
    for shares in portions:
        if states is not None and not collected:
            with work.stage(index, "observe"):
                last = shares is portions[-1]
                collected = gather(work.skeleton, index, shares, states, work.solve, work.device, last=last)
        with work.stage(index, "solve"):
            for share in shares:
                statistics = collected.pop(0) if collected else None
                reports.append(_solve(work, index, share, statistics, scales, weights))
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
    work: _Work, index: int, sites: Sequence[Site], portions: Sequence[Sequence[Share]], states: States
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
            last = len(portions) == 1
            collected = gather(work.skeleton, index, shares, states, work.solve, work.device, last=last)
        with work.stage(index, "scale"):
            grams = [borrowing(statistics, work.solve.borrow) for statistics in collected]
            chosen = [_choose(work, index, *each).strength for each in zip(shares, collected)]
            costs = (
                error_cost(share.name, gram, strength, work.quant, work.solve)
                for share, gram, strength in zip(shares, grams, chosen)
            )
            scales.decide(shares, grams, costs, work.quant, _scale_dtype(work, shares[0].site))
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


def _choose(work: _Work, index: int, share: Share, statistics: Statistics) -> Choice:
    """The strength of a share, chosen once in a block."""
    if share.name not in work.choices:
        work.choices[share.name] = choose_strength(
            share.name,
            share.site.name.removeprefix(f"{work.skeleton.prefix}.{index}."),
            share.weight(work.skeleton.model),
            statistics,
            work.quant,
            work.solve,
            scale_dtype=_scale_dtype(work, share.site),
            strengths=work.strengths,
        )
    return work.choices[share.name]


def _solve(
    work: _Work,
    index: int,
    share: Share,
    statistics: Statistics | None,
    scales: BlockScales | None,
    weights: dict[str, QuantizedWeight],
) -> SolveReport:
    """Quantize one share and add its members to `weights`."""
    weight, dtype = share.weight(work.skeleton.model), _scale_dtype(work, share.site)
    scaling = scales.of(share) if scales else None
    choice = None if statistics is None else _choose(work, index, share, statistics)
    solved, report = solve_site(
        share.name, weight, statistics, work.quant, work.solve, scale_dtype=dtype, scaling=scaling, choice=choice
    )
    for target, part in share.site.split(solved, share.first):
        weights[target.linear] = QuantizedWeight(part.codes.cpu(), part.scales.cpu(), part.zeros.cpu(), part.bits)
    return report


def _scale_dtype(work: _Work, site: Site) -> torch.dtype:
    stored = work.source.dtype(f"{site.members[0].linear}.weight")
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16


def _replay(work: _Work, index: int, states: States) -> None:
    """Move the hidden states on through the quantized block."""
    for windows, _ in states.batches:
        states.hidden[windows].copy_(work.skeleton.call_block(index, states.hidden[windows].to(work.device)))
    if not bool(torch.isfinite(states.hidden).all()):
        raise NumericError(f"what leaves {work.skeleton.prefix}.{index} holds NaN or Inf on the calibration text")

"""Quantize block by block: load, observe, method, replay. A generator: it yields, and writes and prints nothing.

Only one block's weights are in memory at a time. Hidden states of all windows wait on the host; a block reads them,
and after its weights are quantized runs once more over them, so that the next block is calibrated on what it will see.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from sarqc.checkpoint.state import ChunkedTensor
from sarqc.config import GRAM_BUDGET, MethodConfig, QuantConfig
from sarqc.errors import ArgumentError, ModelError, NumericError
from sarqc.method.gram import MAX_LOST, Gram, Statistics, shrink_experts
from sarqc.method.lambda_search import LambdaSearch
from sarqc.method.layer import LayerReport, merge_reports
from sarqc.model.layers import Target, Targets, check_group_size, targets
from sarqc.model.lazy_model import Skeleton
from sarqc.model.residual import find_residual_write, through
from sarqc.model.sites import Share, Site, find_sites, separate_sites, stack, write_back
from sarqc.model.smoothing import find_mappings
from sarqc.model.source import PrefetchingSource, TensorSource
from sarqc.pipeline.activations import MEMORY, PROBE_TOKENS, Room, States, cut, enter, windows_at_once
from sarqc.pipeline.channel_scales import BlockScales
from sarqc.pipeline.comm import SINGLE_PROCESS, Comm, synchronize_oom
from sarqc.pipeline.passes import collect
from sarqc.pipeline.quantize_site import SiteQuantizer, Weights
from sarqc.pipeline.workbench import OnProgress, Recall, Workbench


@dataclass(frozen=True)
class BlockResult:
    """weights: by the checkpoint's names, without ".weight"; E = 1, on the CPU. reports: one for each solve.
    seconds: of each stage (load, observe, scale, method, replay). changed: tensors that are not quantized and took up
    channel scales (norms, routers, biases), on the CPU; they replace the checkpoint's own, by its names, in its dtypes.
    notes: what did not go as planned, in words.
    leaving: hidden states [S, L, H] that enter the next block, None where nothing is run forward or no block follows.
    They are the run's own, good until the next block is asked for, and come from all ranks to rank 0: every rank has to
    go through them, and to the others there are none."""

    index: int
    weights: Weights
    reports: list[LayerReport]
    seconds: dict[str, float]
    changed: dict[str, Tensor]
    notes: list[str]
    leaving: ChunkedTensor | None


@dataclass(frozen=True)
class Start:
    """Where a continued run begins: at `block`, which is entered by `hidden` [S, L, H].

    Without `hidden` (and where it is needed) the embeddings are moved through the blocks before once more, with the
    weights and the changed tensors that `stored(index)` hands back: forward passes, no solving, and the same bits.
    lambda_search: what the blocks before have said about strengths.
    """

    block: int
    hidden: ChunkedTensor | None
    stored: Callable[[int], tuple[Weights, dict[str, Tensor]]]
    lambda_search: LambdaSearch = field(default_factory=LambdaSearch)


@torch.no_grad()
def run(
    skeleton: Skeleton,
    source: TensorSource,
    tokens: Tensor | None,
    quant: QuantConfig,
    method: MethodConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    micro_batch: int | None = None,
    folds: int | None = None,
    gram_budget: int = GRAM_BUDGET,
    start: Start | None = None,
    recall: Recall | None = None,
    on_progress: OnProgress | None = None,
    comm: Comm = SINGLE_PROCESS,
    room: Room = MEMORY,
    prefetch: bool = False,
    bit_widths: Mapping[str, int] | None = None,
) -> Generator[BlockResult, None, None]:
    """Quantize every block of `skeleton` in order, from `start` on.

    tokens: int64 [S, L] windows to calibrate on; None only where `method.calibrated` is False, and then nothing is run
    forward. dtype: of weights and hidden states on the way, the skeleton's by default. micro_batch: windows at once, by
    default as many as hold 1024 tokens on a CPU, 8192 on a GPU. folds: stretches of the windows whose Grams are kept
    apart, by default two halves where a strength has to be chosen. gram_budget: bytes for Grams at a time; experts
    beyond it are observed in further passes. recall: has the statistics already; `tokens` are then only looked at to
    see which layers read what, a few of them will do. comm: the ranks of this run; each is given all tokens and the
    whole of `start`, takes windows of its own, solves some of the matrices, and yields the results of all. room: where
    hidden states are kept. prefetch: read the next block's tensors from `source`, in a thread, while a block is at
    work; close the generator if you do not go to its end. bit_widths: bits of every linear layer by the checkpoint's
    name, where `quant` lets them differ; those of a site are the same.

    Scales get the dtype the checkpoint stores the weight in; bf16 where that is neither bf16 nor fp16, because it keeps
    fp32's range. Where the device runs out of memory the micro-batch or the Grams at a time are halved for the rest of
    the run, and the result notes it. Rows of activations that are not finite are left out and noted. Raises
    `NumericError` naming the layer where weights, or more than 1 % of the rows of activations, are not finite, and
    `ResourceError` where there is nothing left to halve.
    """
    found = targets(skeleton, quant)
    check_group_size(found, quant)
    announce = on_progress or (lambda *_: None)
    start = start or Start(0, None, lambda _: ({}, {}))
    target = torch.device(device)
    prefetched = PrefetchingSource(source) if prefetch else None
    source = prefetched or source
    solving = SiteQuantizer(skeleton, source, quant, method, target, start.lambda_search, comm, bit_widths)
    work = Workbench(skeleton, source, method, target, dtype, gram_budget, announce, recall, solving, comm, prefetched)
    with prefetched or nullcontext():
        states = _enter(work, tokens, start, micro_batch, folds, room) if method.calibrated else None
        for index in range(start.block if states else 0):
            if states and (start.hidden is None or states.original is not None):
                _pass_done(work, index, found, states, start)
        for index in range(start.block, len(skeleton.blocks)):
            yield _run_block(work, index, found, states)


def _enter(
    work: Workbench, tokens: Tensor | None, start: Start, micro_batch: int | None, folds: int | None, room: Room
) -> States:
    """The hidden states that the run begins with, cut into micro-batches."""
    comm = work.comm
    folds = folds or (min(2, len(tokens)) if tokens is not None and work.method.needs_validation else 1)
    if tokens is None or tokens.dim() != 2 or not 1 <= folds <= len(tokens):
        shape = None if tokens is None else list(tokens.shape)
        raise ArgumentError(f"tokens = {shape} with folds = {folds}: give [windows, length], a window per fold")
    micro_batch = micro_batch or windows_at_once(work.device, tokens.shape[1])
    if comm.size > 1 and not comm.ordered:  # where order counts they stay what they are in one process
        micro_batch = min(micro_batch, max(1, len(tokens) // folds // comm.size))
    return enter(
        work.skeleton, work.source, tokens, cut(len(tokens), micro_batch, folds), folds, device=work.device,
        dtype=work.dtype, hidden=start.hidden, original=work.method.error_correction, comm=comm, room=room,
    )  # fmt: skip


def _run_block(work: Workbench, index: int, found: Targets, states: States | None) -> BlockResult:
    skeleton, members = work.skeleton, found.of_block(index)
    work.seconds, work.notes = {}, []
    with work.stage(index, "load"):
        work.load(index)
        _check_weights(skeleton, members)
        sites = separate_sites(skeleton, members) if states is None else _find_sites(work, index, found, states)
    if states is not None and states.original is not None:
        weights, reports, changed = _solve_in_two(work, index, sites, states)
    else:
        weights, reports, scales = _solve(work, index, sites, states, scaled=work.method.channel_scales)
        changed = scales.fold_in() if scales else {}
    lost = [target.linear for target in members if target.linear not in weights]
    if lost:
        raise ModelError(f"{lost[0]} was targeted and came out unquantized ({len(lost)} such layers)")
    leaving = None
    if states is not None and index + 1 < len(skeleton.blocks):
        with work.stage(index, "replay"):
            work.with_memory(index, states, lambda: _replay(work, index, members, states, weights, changed))
            _check_leaving(work, index, states)
            leaving = states.whole(work.comm)
    skeleton.unload_block(index)
    ordered = {target.linear: weights[target.linear] for target in members}
    return BlockResult(index, ordered, reports, dict(work.seconds), changed, list(dict.fromkeys(work.notes)), leaving)


def _find_sites(work: Workbench, index: int, found: Targets, states: States) -> list[Site]:
    """The sites of a block that is loaded; where errors are corrected, one of them writes to the residual stream.

    The original's states are let go where the first block that is quantized has none, as in models with a norm behind
    every layer: to find that out for every block would cost them a second model's forward passes. Ranks take rank 0's
    word, which is that of one process: each of them looks at a window of its own.
    """
    sites = find_sites(work.skeleton, index, found.of_block(index), states.probe().to(work.device))
    if states.original is None:
        return sites
    seen = find_residual_write(work.skeleton, index, sites, states.original[:1, :PROBE_TOKENS].to(work.device))
    name, residual_write = work.comm.all_gather_object(seen)[0] or (None, None)
    if name is None and index == found.first_block:
        states.original = states.wanted = None
        where = f"{work.skeleton.prefix}.{index}"
        work.notes.append(
            f"no layer of {where} writes into the stream as it is: the error of earlier layers is not corrected"
        )
    return [replace(site, residual_write=residual_write) if site.name == name else site for site in sites]


_Solved = tuple[Weights, list[LayerReport], BlockScales | None]


def _solve(
    work: Workbench,
    index: int,
    sites: Sequence[Site],
    states: States | None,
    *,
    scaled: bool,
    prepare: Callable[[], None] = lambda: None,
) -> _Solved:
    """Some sites of a block, with less at once where it must be. scaled: search channel scales for them first. prepare:
    makes a block that was loaded anew what it has to be."""
    known = work.solving.lambda_search.copy()

    def attempt() -> _Solved:
        work.solving.begin(known)  # what a failed attempt was told is asked, and counted, again
        synchronize_oom(work.comm, prepare)
        return _solve_sites(work, index, sites, states, scaled)

    return work.with_memory(index, states, attempt)


def _solve_in_two(
    work: Workbench, index: int, sites: Sequence[Site], states: States
) -> tuple[Weights, list[LayerReport], dict[str, Tensor]]:
    """The layer that writes to the residual stream after all others, so that it can correct their errors. Its inputs
    are not rescaled: what would take up their scales is quantized by then."""
    others, last = ([site for site in sites if bool(site.residual_write) is joined] for joined in (False, True))
    reader = next((site.residual_write.reader for site in last if site.residual_write), None)
    weights, reports, scales = _solve(work, index, others, states, scaled=work.method.channel_scales)
    with work.stage(index, "replay"):  # as long as the block is what it was
        work.with_memory(index, states, lambda: _move_original_on(work, index, states, reader))
    changed = scales.fold_in() if scales else {}
    if not last:
        return weights, reports, changed
    before = [target for site in others for target in site.members]
    joined, told, _ = _solve(
        work, index, last, states, scaled=False, prepare=lambda: _put(work, index, before, weights, changed)
    )
    return weights | joined, reports + told, changed


def _solve_sites(work: Workbench, index: int, sites: Sequence[Site], states: States | None, scaled: bool) -> _Solved:
    """Observe and solve some sites of a block, as many at a time as the Grams have room for."""
    weights: Weights = {}
    reports: dict[str, list[LayerReport]] = {}
    portions = work.portions(sites, states.folds if states else 0)
    scales, collected = None, None
    if scaled and states is not None:
        scales, collected = _scale(work, index, sites, portions, states)
    for shares in portions:
        if states is not None and not collected:
            collected = _observe(work, index, shares, states)
        with work.stage(index, "solve"):
            solved, told = work.solving.quantize(index, shares, collected, scales)
            collected = None
        weights |= solved
        for share, report in zip(shares, told):
            reports.setdefault(share.site.name, []).append(report)
    return weights, [replace(merge_reports(parts), site=name) for name, parts in reports.items()], scales


def _observe(work: Workbench, index: int, shares: Sequence[Share], states: States) -> list[Statistics]:
    """Statistics of every share, recalled or from a pass of all windows through the block."""
    if work.recall:
        return work.recall(index, shares)
    with work.stage(index, "observe"):
        collected, notes = collect(work.skeleton, index, shares, states, work.method, work.device, work.comm)
    work.notes += notes
    return collected


def _scale(
    work: Workbench, index: int, sites: Sequence[Site], portions: Sequence[Sequence[Share]], states: States
) -> tuple[BlockScales, list[Statistics] | None]:
    """The channel scales of a block, all before any of its weights is quantized, because scales end up in weights of
    other sites; and the statistics, where those of all sites fit at once and need not be collected again."""
    with work.stage(index, "scale"):
        probe = states.probe().to(work.device)
        folds, reasons = synchronize_oom(work.comm, partial(find_mappings, work.skeleton, index, sites, probe))
        scales = BlockScales(work.skeleton, work.source, sites, folds, reasons, work.comm)
    collected: list[Statistics] = []
    for shares in portions:
        collected = _observe(work, index, shares, states)
        with work.stage(index, "scale"):
            work.solving.choose(index, shares, collected)
            grams = synchronize_oom(work.comm, partial(_shrunk, collected, work.method.expert_shrinkage))
            dtype = work.solving.scale_dtype(shares[0].site)
            scales.decide(shares, grams, work.solving.cost, work.solving.quant_of, dtype)
    return scales, collected if len(portions) == 1 else None


def _shrunk(collected: Sequence[Statistics], shrinkage: float) -> list[Gram]:
    return [shrink_experts(statistics, shrinkage) for statistics in collected]


def _check_weights(skeleton: Skeleton, members: Sequence[Target]) -> None:
    """`NumericError` naming the first targeted layer with a weight that is not finite."""
    for parameter in dict.fromkeys(target.parameter for target in members):
        matrices = stack(skeleton.model, parameter)
        # One at a time: what says of each weight whether it is finite would take more memory than a layer of experts.
        if bool(torch.stack([torch.isfinite(matrix).all() for matrix in matrices]).all()):
            continue
        for target in members:
            rows = matrices[target.expert, target.start : target.start + target.shape[0]]
            if target.parameter == parameter and not bool(torch.isfinite(rows).all()):
                raise NumericError(f"{target.linear}.weight holds NaN or Inf; repair the checkpoint before quantizing")


def _replay(
    work: Workbench,
    index: int,
    members: Sequence[Target],
    states: States,
    weights: Weights,
    changed: Mapping[str, Tensor],
) -> None:
    """Move the hidden states on through the block as it is after quantization."""
    _put(work, index, members, weights, changed)
    states.move_on(lambda hidden: work.skeleton.call_block(index, hidden), work.device)


def _put(
    work: Workbench, index: int, members: Sequence[Target], weights: Weights, changed: Mapping[str, Tensor]
) -> None:
    """Put the quantized weights of these members, and what took up channel scales, in the place of the block's own."""
    skeleton = work.skeleton
    for target in members:
        write_back(skeleton.model, target, weights[target.linear])
    for parameter in skeleton.parameters(index) if changed else ():
        for piece in skeleton.pieces[parameter]:
            if piece.name in changed:
                whole = skeleton.model.get_parameter(parameter)
                part = whole if piece.expert is None else whole[piece.expert, piece.start : piece.start + piece.rows]
                part.copy_(changed[piece.name])


def _check_leaving(work: Workbench, index: int, states: States) -> None:
    """`NumericError` where too much of what leaves a block, on all ranks, is not finite; a note where something is."""
    counted = work.comm.all_gather_object((states.lost_rows(), states.hidden.shape[0] * states.hidden.shape[1]))
    lost, rows = map(sum, zip(*counted))
    if lost:
        where = f"{lost} of {rows} rows of what leaves {work.skeleton.prefix}.{index} hold NaN or Inf"
        if lost > MAX_LOST * rows:
            raise NumericError(f"{where} on the calibration text; look at the model, its dtype or the text")
        work.notes.append(where)


def _move_original_on(work: Workbench, index: int, states: States, reader: str | None = None) -> None:
    states.move_original_on(lambda hidden: through(work.skeleton, index, reader, hidden), work.device)


def _pass_done(work: Workbench, index: int, found: Targets, states: States, start: Start) -> None:
    """Move whatever hidden states are not there yet through a block that was quantized before."""
    work.load(index)
    if index == found.first_block:
        _find_sites(work, index, found, states)  # is the original of use?
    with work.stage(index, "replay"):
        work.with_memory(index, states, lambda: _move_original_on(work, index, states))
        if start.hidden is None:
            weights, changed = start.stored(index)
            members = found.of_block(index)
            work.with_memory(index, states, lambda: _replay(work, index, members, states, weights, changed))
            _check_leaving(work, index, states)
    work.skeleton.unload_block(index)

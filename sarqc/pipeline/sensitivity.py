"""Sensitivity analysis: the loss of the model from each site at each bit-width, before any weight is quantized.

Errors of different sites have no common unit: 1 % of the input of a softmax is not 1 % of the output of an MLP. They
have one at the end of the model. So each site alone is quantized at one bit-width, and a few sequences run on from
there to the logits. The mean KL divergence of the next token, times the solver's loss at another bit-width relative to
that one (`method.bit_allocation`), is the loss of the site. Divergences of independent errors add up while they are
small. `benchmarks/quality/MIXED.md` has the alternatives: RTN in place of the solver misjudges the sites that matter
most.

One block is in memory at a time. These few sequences go through the model as a stream of their own, one for every site
so far beside that of the model as it is, which all go through the next block: half the blocks for each site, on
average. Where a block reads more than hidden states (keys and values of an earlier one, say), it cannot be entered in
the middle: the streams of all sites begin with the embeddings, all blocks for each site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sarqc.config import MethodConfig, QuantConfig
from sarqc.errors import ArgumentError, ResourceError, first_line, out_of_memory
from sarqc.method.bit_allocation import loss_by_bits, probe_bits, probe_weight
from sarqc.method.gram import Statistics
from sarqc.method.lambda_search import LambdaSearch
from sarqc.method.weight import QuantizedWeight
from sarqc.model.candidates import Target
from sarqc.model.layers import Targets
from sarqc.model.lazy_model import LazyModel
from sarqc.model.perplexity import Tally
from sarqc.model.sites import Site, SiteChunk, find_sites, separate_sites, stack, write_back
from sarqc.model.source import TensorSource
from sarqc.pipeline.block import Portions
from sarqc.pipeline.comm import SINGLE_PROCESS
from sarqc.pipeline.execution import Execution
from sarqc.pipeline.forward import Forward, drain
from sarqc.pipeline.grams import Collector, Rows
from sarqc.pipeline.points import Point, order_of
from sarqc.pipeline.quantize_site import SiteQuantizer
from sarqc.pipeline.stored_states import fingerprint, replaying
from sarqc.pipeline.streams import Streams, Text, cut
from sarqc.pipeline.work_split import work_items

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
    """A site that was tried in block `block`. solved: relative losses by width. stream: the few windows, with it."""

    block: int
    site: Site
    solved: dict[int, float]
    stream: Forward

    def result(self, divergence: float) -> SiteSensitivity:
        return SiteSensitivity(
            site=self.site.name,
            linears=tuple(target.linear for target in self.site.members),
            shapes=tuple(target.shape for target in self.site.members),
            modules=tuple(dict.fromkeys(target.module for target in self.site.members)),
            divergence=divergence,
            losses={width: divergence * loss for width, loss in self.solved.items()},
        )


def measure_sensitivity(
    lazy: LazyModel,
    source: TensorSource,
    selected: Targets,
    tokens: Tensor,
    quant: QuantConfig,
    method: MethodConfig,
    execution: Execution,
    mine: Callable[[int], bool] = lambda _: True,
) -> list[tuple[int, SiteSensitivity]]:
    """The sensitivity of every site.

    Beside a block, at most a copy of one of its sites is on the device.

    Args:
        lazy: The model, without weights.
        source: Its weights.
        selected: The layers to quantize.
        tokens: int64 [S, L]; at most 2^14 tokens of evenly spaced sequences are used.
        quant: The number format, with the bit-widths to choose from.
        method: The method.
        execution: Where and in which pieces; ranks and bit-widths in it are not read.
        mine: Blocks that this rank measures.

    Returns:
        (block, sensitivity) in the order of blocks.
    """
    windows, device = _evenly_spaced(tokens), execution.place
    members = [selected.of_block(index) if mine(index) else [] for index in range(len(lazy.blocks))]
    solving = SiteQuantizer(lazy, source, quant, method, device, LambdaSearch(seed=execution.seed), SINGLE_PROCESS)
    try:
        return _measured(solving, members, windows, execution, 0)
    except _MoreThanHiddenStates:
        lazy.unload_outer()
        return _measured(solving, members, windows, execution, sum(len(separate_sites(lazy, each)) for each in members))


class _MoreThanHiddenStates(Exception):
    """A block is entered with more than hidden states."""


def _measured(
    solving: SiteQuantizer, members: Sequence[list[Target]], windows: Tensor, execution: Execution, spares: int
) -> list[tuple[int, SiteSensitivity]]:
    """The sensitivity of every site of `members` by block. spares: streams for trials that begin with the embeddings; 0
    to begin each where its site is."""
    lazy, source, device, dtype = solving.lazy, solving.source, execution.place, execution.dtype
    batches = cut(len(windows), execution.sequences_at_once(windows.shape[1]), FOLDS)
    text = Text.of(windows, batches, FOLDS, SINGLE_PROCESS)
    few = windows[:: -(-len(windows) // TRIED_WINDOWS), :TRIED_LENGTH]
    announce = execution.on_progress or (lambda index, stage: None)
    with ExitStack() as stack_, torch.no_grad():
        streams = stack_.enter_context(Streams(lazy, source, device, dtype, execution.memory))
        streams.begin(text, reference=False)
        lazy.load_outer(source, device, dtype)  # trials begin with the embeddings, too
        looking = _SensitivityStreams(solving, streams, few, Portions(execution.gram_budget), spares)
        stack_.callback(looking.close)
        for index, targeted in enumerate(members):
            announce(index, "sensitivity")
            looking.enter(index)
            lazy.load_block(index, source, device, dtype)
            try:
                looking.leave(index, targeted)
            finally:  # a second measurement begins without it
                lazy.unload_block(index)
        lazy.load_outer(source, device, dtype, head=True)
        results = list(looking.results())
        lazy.unload_outer()
    return results


class _SensitivityStreams:
    """The streams of a measurement: the text, the few windows through the model as it is, and through each trial."""

    def __init__(self, solving: SiteQuantizer, streams: Streams, few: Tensor, portions: Portions, spares: int) -> None:
        self._solving = solving
        self._lazy = solving.lazy
        self._streams = streams
        self._few = few
        self._portions = portions
        self._collector = Collector(solving.method, FOLDS, solving.device, solving.lazy.dtype, SINGLE_PROCESS)
        self._plain = self._stream(0)
        self._trials: list[_Trial] = []
        self._spares = [self._stream(0) for _ in range(spares)]
        self.enter(0)

    def enter(self, index: int) -> None:
        """Bring all streams to a block."""
        self._streams.enter(index)
        for stream in self._all():
            stream.enter(index)

    def leave(self, index: int, members: Sequence[Target]) -> None:
        """Try each site of a loaded block, then run all streams through it with its own weights."""
        losses, form = self._losses(index, members) if members else [], self._streams.form
        self._streams.leave_quantized(index)
        self._streams.leave_probe(index)
        begun = [self._begin(index, form, *one) for one in losses]
        for stream in self._all():
            drain(stream.leave(index))
        self._trials += begun

    def results(self) -> Iterator[tuple[int, SiteSensitivity]]:
        """What each trial loses; needs the head."""
        (expected,) = (arrival.output for arrival in self._plain.at(self._end))
        for trial in self._trials:
            tally = Tally()
            (own,) = (arrival.output for arrival in trial.stream.at(self._end))
            for window, mine, reference in zip(self._few, own, expected):
                tally.add(mine[:-1], window[1:].to(mine.device), reference[:-1])
            trial.stream.close()
            yield trial.block, trial.result(tally.kl)

    def close(self) -> None:
        """End all streams."""
        for stream in self._all():
            stream.close()

    def _all(self) -> Iterator[Forward]:
        yield self._plain
        yield from (trial.stream for trial in self._trials)
        yield from self._spares

    @property
    def _end(self) -> Point:
        return Point("end", len(self._lazy.blocks))

    def _stream(self, first: int) -> Forward:
        return Forward([self._run], self._lazy.blocks, first=first, skipped=self._lazy.skipped)

    def _run(self) -> object:
        return self._lazy.model(input_ids=self._few.to(self._solving.device), use_cache=False).logits

    def _losses(self, index: int, members: Sequence[Target]) -> list[tuple[Site, dict[int, float], _Weights]]:
        """Of each site what it loses at each width, and its weights at the one that is tried."""
        call = self._streams.call(index)
        sites = find_sites(self._lazy, members, call)
        points = [Point("site", index, site.entry) for site in sites]
        self._streams.hooks.watch(points, self._lazy.model, self._solving.method.router_weight_power)
        order, by_entry = order_of(points, call.run), {site.entry: site for site in sites}
        self._streams.quantized.begin_block(order)
        return [self._with_memory(index, by_entry[point.name], point) for point in order]

    def _with_memory(self, index: int, site: Site, point: Point) -> tuple[Site, dict[int, float], _Weights]:
        """A site with fewer Grams at a time for as long as memory runs out. That of the forward itself is not caught:
        a micro-batch that runs out has ended."""
        drain(self._streams.quantized.at(point))
        self._portions.begin()
        while True:
            try:
                return self._site(site, point)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = first_line(error)
            if self._portions.together == 1:
                raise ResourceError(
                    f"{self._solving.device} has no memory left at {self._lazy.prefix}.{index} ({reason}), with "
                    "one Gram at a time: use a device with more memory, a smaller --micro-batch or --device cpu"
                )
            self._portions.halve()

    def _site(self, site: Site, point: Point) -> tuple[Site, dict[int, float], _Weights]:
        losses = dict.fromkeys(self._solving.quant.bit_options, 0.0)
        weights: _Weights = []
        for (chunk,) in self._portions.of([site], FOLDS):
            (statistics,), _ = self._collector.collect([chunk], partial(self._rows, site, point))
            own, solved = _share(self._solving, chunk, statistics)
            losses = {width: loss + own[width] for width, loss in losses.items()}
            weights += solved
        probed = losses[probe_bits(self._solving.quant)]  # 0 where no row excites the weight
        return site, {width: loss / probed if probed > 0 else 0.0 for width, loss in losses.items()}, weights

    def _rows(self, site: Site, point: Point) -> Iterator[Rows]:
        for arrival, (_, fold) in zip(self._streams.quantized.at(point), self._streams.text.batches):
            yield Rows(site, fold, arrival.x.reshape(-1, site.in_features), arrival.offsets)

    def _begin(self, index: int, form: str | None, site: Site, solved: dict[int, float], weights: _Weights) -> _Trial:
        """A trial of a site through its block, with these weights in its place; its own are put back."""
        model = self._lazy.model
        stream = self._replay(index, form)
        originals = {name: stack(model, name).clone() for name, _, _ in site.row_ranges}
        for target, weight in weights:
            write_back(model, target, weight)
        drain(stream.leave(index))
        for name, original in originals.items():
            stack(model, name).copy_(original)
        return _Trial(index, site, solved, stream)

    def _replay(self, index: int, form: str | None) -> Forward:
        """The few windows, waiting to enter a block as they do in the model as it is. form: how the one before returns
        them."""
        if self._spares:
            return self._spares.pop()
        stream = self._stream(index)
        hidden = self._plain.residuals()
        if index == 0:
            stream.enter(0)
            return stream
        if form is None:
            raise _MoreThanHiddenStates
        with replaying(self._lazy.layers, index, form, lambda number: hidden[number]):
            (met,) = stream.at(Point("enter", index))
        (entry,) = self._plain.at(Point("enter", index))
        if fingerprint(met) != fingerprint(entry):
            stream.close()
            raise _MoreThanHiddenStates
        return stream


def _evenly_spaced(tokens: Tensor) -> Tensor:
    """Evenly spaced windows of at most `TOKENS` tokens together, two at least: one alone is cut in two."""
    count = min(len(tokens), max(FOLDS, TOKENS // tokens.shape[1]))
    windows = tokens[torch.linspace(0, len(tokens) - 1, count).round().long()]
    if len(windows) < FOLDS:
        half = tokens.shape[1] // FOLDS
        windows = windows[:, : FOLDS * half].reshape(FOLDS, half)
    if windows.shape[1] < 2:
        raise ArgumentError(f"{tokens.numel()} tokens are too few to measure losses on: give more calibration text")
    return windows


_Weights = list[tuple[Target, QuantizedWeight]]


def _share(solving: SiteQuantizer, chunk: SiteChunk, statistics: Statistics) -> tuple[dict[int, float], _Weights]:
    """The losses of a chunk, and its members on the host, solved an item at a time: as in a run."""
    model, how = solving.lazy.model, (solving.quant, solving.method, solving.scale_dtype(chunk.site))
    losses = loss_by_bits(chunk.name, chunk.weight(model), statistics, *how, solving.lambda_search.seed)
    statistics.merge_folds()
    solved: _Weights = []
    for item in work_items([chunk], 1, solving.device, gram=True):
        own, experts = item.chunk, slice(item.chunk.first - chunk.first, item.chunk.stop - chunk.first)
        weight = probe_weight(chunk.name, own.weight(model), statistics, *how, experts)
        solved += chunk.site.split(weight.to("cpu"), own.first)
    return losses, solved

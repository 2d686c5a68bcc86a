"""One decoder block, quantized site by site while all micro-batches wait in it.

A layer that writes to the residual also corrects the error that the residual has there. Its target is known only after
the layer has run, so it runs with its original weight. Then it is quantized, and the difference of the weights, times
its inputs, is added to the residual.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from sarqc.errors import NumericError
from sarqc.method.gram import Gram, Statistics, all_finite, row_scales, shrink_experts
from sarqc.method.layer import LayerReport, merge_reports
from sarqc.model.candidates import Target
from sarqc.model.lazy_model import LazyModel
from sarqc.model.residual import residual_writes
from sarqc.model.sites import ResidualWrite, Site, SiteChunk, find_sites, separate_sites, stack, write_back
from sarqc.model.smoothing import find_mappings
from sarqc.pipeline.channel_scales import BlockScales
from sarqc.pipeline.comm import synchronize_oom
from sarqc.pipeline.forward import drain
from sarqc.pipeline.grams import Collector, Rows, gram_bytes, portions
from sarqc.pipeline.journal import Journal
from sarqc.pipeline.points import Point, order_of
from sarqc.pipeline.quantize_site import SiteQuantizer, Weights
from sarqc.pipeline.streams import Streams


@dataclass
class Portions:
    """Bytes for Grams at a time. together: the most matrices whose Grams were held at once since `begin`, in
    `bytes`."""

    budget: int
    together: int = 1
    bytes: int = 0

    def of(self, sites: Sequence[Site], folds: int) -> list[list[SiteChunk]]:
        """The sites in portions whose Grams fit."""
        result = list(portions(sites, folds, self.budget))
        for chunks in result:
            self.together = max(self.together, sum(chunk.stop - chunk.first for chunk in chunks))
            self.bytes = max(self.bytes, sum(gram_bytes(chunk, folds) for chunk in chunks))
        return result

    def begin(self) -> None:
        """Forget what earlier sites had at once."""
        self.together, self.bytes = 1, 0

    def halve(self) -> None:
        """Half as many bytes from now on."""
        self.budget = min(self.budget // 2, self.bytes // 2)
        self.begin()


@dataclass
class Block:
    """A loaded block at work. first: whether it is the first one with layers to quantize. weights, reports, changed: as
    in `BlockResult`, as far as they are known."""

    solving: SiteQuantizer
    index: int
    members: list[Target]
    journal: Journal
    portions: Portions
    first: bool
    weights: Weights = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    changed: dict[str, Tensor] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    order: list[Point] = field(default_factory=list)
    scales: BlockScales | None = None

    def look(self, streams: Streams) -> None:
        """Find the sites and where their outputs join the stream, and the points at which the streams are to suspend.

        The reference is let go where the first block has no layer that writes into the stream as it is, as in models
        with a norm behind every layer: to find that out for every block would cost a second stream. Ranks take rank 0's
        word.
        """
        comm = self.solving.comm
        self.sites, seen = synchronize_oom(comm, partial(self._see, streams))
        if streams.reference is not None:
            self._take_residual_writes(streams, comm.all_gather_object(seen)[0])
        entries = [self._entry(site) for site in self.sites]
        readers = [point for point in map(self._place, self.sites) if point.kind == "reader"]
        streams.hooks.watch([*readers, *entries], self.solving.lazy.model, self.solving.method.router_weight_power)
        run = streams.call(self.index).run
        self.order = synchronize_oom(comm, partial(order_of, [*readers, *entries], run))
        stops = [point for point in self.order if point.kind != "enter"]  # they wait there anyway
        streams.quantized.begin_block(stops, [self._entry(site) for site in self.sites if site.residual_write])
        streams.probe.begin_block()
        if streams.reference is not None:
            streams.reference.begin_block(readers, readers)

    def quantize(self, streams: Streams) -> None:
        """Quantize every site as the micro-batches reach it; they wait in front of the block, loaded and looked at."""
        inside = self.index < len(self.solving.lazy.blocks)
        if self.solving.method.channel_scales and self.sites and inside:
            self.scales = self._choose_scales(streams)
            self.changed = synchronize_oom(self.solving.comm, self.scales.fold_in)
        sites = {self._place(site): site for site in self.sites}
        for point in (*self.order, Point("leave", self.index)):
            if point in sites:
                self._quantize(sites[point], point, streams)

    def quantize_alone(self) -> None:
        """Quantize every parameter by itself, by a method that looks at weights alone."""
        self.sites = separate_sites(self.solving.lazy, self.members)
        for chunks in self.portions.of(self.sites, 0):
            with self.journal.stage(self.index, "solve"):
                weights, reports = self.solving.quantize(self.index, chunks, None, None)
            self.journal.notes += underflowed(self.solving.lazy, self.members, weights)
            self.weights |= weights
            self.reports += reports

    def put_stored(self, weights: Weights, changed: Mapping[str, Tensor], streams: Streams) -> None:
        """Put what an earlier run has stored of the block, which is looked at, in the place of its own. Layers whose
        outputs were corrected keep their weights, and those outputs are corrected again: so the stream has the same
        bits."""
        lazy, self.weights = self.solving.lazy, weights
        for site in self.sites:
            if not site.residual_write:
                self._put(site, weights)
        for parameter in lazy.parameters(self.index) if changed else ():
            for stored in lazy.slices[parameter]:
                if stored.name in changed:
                    stored.of(lazy.model.get_parameter(parameter)).copy_(changed[stored.name])
        for site in self.sites:
            if site.residual_write:
                self._correct(site, streams)

    def put_corrected(self) -> None:
        """Put the weights of layers whose outputs were corrected in place, for streams that are still to pass."""
        for site in self.sites:
            if site.residual_write:
                self._put(site, self.weights)

    def collector(self, streams: Streams) -> Collector:
        """What sums statistics of this block."""
        solving = self.solving
        return Collector(solving.method, streams.text.folds, solving.device, solving.lazy.dtype, solving.comm)

    def _see(self, streams: Streams) -> tuple[list[Site], dict[str, ResidualWrite]]:
        """The sites as the probe shows them, and where their outputs join the stream."""
        call, solving = streams.call(self.index), self.solving
        sites = find_sites(solving.lazy, self.members, call) if self.members else []
        if streams.reference is None:
            return sites, {}
        inside = not solving.method.channel_scales
        return sites, residual_writes(solving.lazy, self.index, sites, call.hidden, call, inside=inside)

    def _take_residual_writes(self, streams: Streams, writes: dict[str, ResidualWrite]) -> None:
        if not writes and self.first:
            streams.drop_reference()
            where = f"{self.solving.lazy.prefix}.{self.index}"
            self.journal.notes.append(
                f"no layer of {where} writes into the stream as it is: the error of earlier layers is not corrected"
            )
        self.sites = [replace(site, residual_write=writes.get(site.name)) for site in self.sites]

    def _entry(self, site: Site) -> Point:
        """Where the inputs of a site are; those of a Linear behind the blocks, which is a unit by itself, at its
        entry."""
        inside = self.index < len(self.solving.lazy.blocks)
        return Point("site", self.index, site.entry) if inside else Point("enter", self.index)

    def _place(self, site: Site) -> Point:
        """Where a site is quantized: at its entry, or where the residual that it has written to is read."""
        if not site.residual_write:
            return self._entry(site)
        reader = site.residual_write.reader
        return Point("reader", self.index, reader) if reader else Point("leave", self.index)

    def _choose_scales(self, streams: Streams) -> BlockScales:
        """The channel scales (AWQ), from a run of the block that is dropped: they end up in weights of other sites, so
        every site is observed before any is quantized. Sites whose outputs are corrected have none: what would take up
        their scales is quantized by then."""
        solving, comm = self.solving, self.solving.comm
        scaled = [site for site in self.sites if not site.residual_write]
        chunked = self.portions.of(scaled, streams.text.folds)
        with self.journal.stage(self.index, "scale"):
            find = partial(find_mappings, solving.lazy, self.index, scaled, streams.call(self.index))
            mappings, reasons = synchronize_oom(comm, find)
            scales = BlockScales(solving.lazy, solving.source, scaled, mappings, reasons, comm)
        for chunks in chunked:
            with self.journal.stage(self.index, "forward"):
                collected, notes = self.collector(streams).collect(chunks, partial(self._observed, chunks, streams))
            self.journal.notes += notes
            with self.journal.stage(self.index, "scale"):
                solving.choose(self.index, chunks, collected)
                grams = synchronize_oom(comm, partial(_shrunk, collected, solving.method.expert_shrinkage))
                scales.decide(chunks, grams, solving.cost, solving.quant_of, solving.scale_dtype(chunks[0].site))
        return scales

    def _observed(self, chunks: Sequence[SiteChunk], streams: Streams) -> Iterator[Rows]:
        """The inputs of every site of these chunks, in a run of the block that is dropped."""
        sites = {chunk.site.entry: chunk.site for chunk in chunks}
        for arrivals, (_, fold) in zip(streams.quantized.look(self.index), streams.text.batches):
            for arrival in arrivals:
                site = sites.get(arrival.point.name) if arrival.point.kind == "site" else None
                if site is not None:
                    yield Rows(site, fold, arrival.x.reshape(-1, site.in_features), arrival.offsets)

    def _quantize(self, site: Site, point: Point, streams: Streams) -> None:
        """Sum a site's Grams and solve it, in portions; put the weights in place, or correct what it has put out."""
        collector, reports, comm = self.collector(streams), [], self.solving.comm
        source = partial(self._lacking if site.residual_write else self._handed, site, point, streams)
        for chunks in self.portions.of([site], streams.text.folds):
            with self.journal.stage(self.index, "forward", site.name):
                if comm.ordered:  # ranks run at once and only sum in turn
                    synchronize_oom(comm, lambda: drain(streams.quantized.at(point)))
                collected, notes = collector.collect(chunks, source)
            self.journal.notes += notes
            with self.journal.stage(self.index, "solve", site.name):
                weights, chunk_reports = self.solving.quantize(self.index, chunks, collected, self.scales)
                del collected
                self.journal.notes += underflowed(self.solving.lazy, site.members, weights)
                self.weights |= weights
                if not site.residual_write:
                    synchronize_oom(comm, partial(self._put, site, weights))
            reports += chunk_reports
        self.reports.append(replace(merge_reports(reports), site=site.name))
        if site.residual_write:
            self._correct(site, streams)

    def _handed(self, site: Site, point: Point, streams: Streams) -> Iterator[Rows]:
        """The inputs of a site, by micro-batch."""
        inputs = self.scales.of(SiteChunk(site, 0, site.experts)).inputs if self.scales else None
        for arrival, (_, fold) in zip(streams.quantized.at(point), streams.text.batches):
            x = arrival.x.reshape(-1, site.in_features)
            if inputs is not None:
                x = unscaled(x, arrival.offsets, inputs)
            yield Rows(site, fold, x, arrival.offsets)

    def _lacking(self, site: Site, point: Point, streams: Streams) -> Iterator[Rows]:
        """The inputs of a site that has written to the residual, and the error of the residual there."""
        assert streams.reference is not None and site.residual_write
        entry = self._entry(site)
        reader = point if site.residual_write.reader else None
        wanted = streams.reference.with_kept(Point("leave", self.index), reader)
        collected = streams.quantized.with_kept(point, entry)
        for (arrival, x), (left, read), (_, fold) in zip(collected, wanted, streams.text.batches):
            assert x is not None
            rows = x.reshape(-1, site.in_features)
            held = row_scales(rows, arrival.x.shape[1])
            lacking = _drift(left.x if read is None else read, arrival.x).mul_(held)
            yield Rows(site, fold, rows * held, None, lacking)

    def _put(self, site: Site, weights: Weights) -> None:
        """Put those of a site's members that are quantized in the place of their own."""
        for target in site.members:
            if target.linear in weights:
                write_back(self.solving.lazy.model, target, weights[target.linear])

    def _correct(self, site: Site, streams: Streams) -> None:
        """Add what the site's new weight puts out more than its own, which is in place, to the stream behind it."""
        change = synchronize_oom(self.solving.comm, partial(self._change, site))
        streams.quantized.correct(self._place(site), self._entry(site), change)

    def _change(self, site: Site) -> Tensor:
        """What the weight of a site with one member became, less what it was, in the model's dtype."""
        (target,) = site.members
        original = stack(self.solving.lazy.model, target.parameter)[0]
        quantized = self.weights[target.linear].to(original.device).dequantize(original.dtype)[0]
        return (quantized.float() - original.float()).to(original.dtype)


def unscaled(x: Tensor, offsets: Tensor | None, inputs: Tensor) -> Tensor:
    """Rows [T, K] as they were before scales [1 or E, K] were folded into what makes them."""
    if len(inputs) == 1 or offsets is None:
        return (x.float() * inputs[0]).to(x.dtype)
    each = torch.repeat_interleave(inputs, offsets.diff(), dim=0, output_size=len(x))
    return (x.float() * each).to(x.dtype)


def check_weights(lazy: LazyModel, members: Sequence[Target]) -> None:
    """`NumericError` naming the first targeted layer with a weight that is not finite."""
    for parameter in dict.fromkeys(target.parameter for target in members):
        matrices = stack(lazy.model, parameter)
        if all_finite(matrices):
            continue
        for target in members:
            rows = matrices[target.expert, target.start : target.start + target.shape[0]]
            if target.parameter == parameter and not bool(torch.isfinite(rows).all()):
                raise NumericError(f"{target.linear}.weight holds NaN or Inf; repair the checkpoint before quantizing")


def underflowed(lazy: LazyModel, members: Sequence[Target], weights: Weights) -> Iterator[str]:
    """A line for each weight with groups that need a smaller scale than its stored dtype has."""
    for target in members:
        if (weight := weights.get(target.linear)) is None:
            continue
        kept = torch.finfo(weight.scales.dtype)
        small = weight.scales[0].abs() <= kept.tiny
        if not bool(small.any()):
            continue
        rows = stack(lazy.model, target.parameter)[target.expert, target.start : target.start + target.shape[0]]
        lost = int((small.to(rows.device) & (rows.reshape(*small.shape, -1) != 0).any(-1)).sum())
        if lost:
            yield (
                f"{lost} of {small.numel()} groups of {target.linear} need a scale below {kept.tiny:.2g}, the smallest "
                f"of {kept.dtype}, and lose their weights: save the model in bfloat16 first"
            )


def _shrunk(collected: Sequence[Statistics], shrinkage: float) -> list[Gram]:
    return [shrink_experts(statistics, shrinkage) for statistics in collected]


def _drift(reference: Tensor, stream: Tensor) -> Tensor:
    """The error of each row of `stream` [B, L, H], reference - stream, [B * L, H].

    The first token of a window is left out. In most models its activations are thousands of times those of the others
    (an attention sink), so that its error would dominate theirs.
    """
    lacking = reference - stream  # exact in their own dtype where they are within a factor of two of each other
    lacking[:, 0] = 0
    return lacking.flatten(0, 1)

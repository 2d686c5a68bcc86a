"""The channel scales of a block (AWQ), chosen before any of its weights is quantized: they end up in weights of other
sites too, so all sites are looked at first, in a run of the block that is dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from sarqc.method.gram import Gram, Statistics, shrink_experts
from sarqc.model.sites import Site, SiteChunk
from sarqc.model.smoothing import find_mappings
from sarqc.pipeline.channel_scales import BlockScales
from sarqc.pipeline.comm import synchronize_oom
from sarqc.pipeline.grams import Rows
from sarqc.pipeline.streams import Streams

if TYPE_CHECKING:
    from sarqc.pipeline.block import Block


def scales_of_block(block: Block, streams: Streams) -> BlockScales:
    """The scales of a block that all streams wait to enter. Sites whose outputs are corrected have none: what would
    take up their scales is quantized by then."""
    solving, journal = block.solving, block.journal
    scaled = [site for site in block.sites if not site.residual_write]
    portions = block.portions.of(scaled, streams.text.folds)
    with journal.stage(block.index, "scale"):
        find = partial(find_mappings, solving.lazy, block.index, scaled, streams.call(block.index))
        folds, reasons = synchronize_oom(solving.comm, find)
        scales = BlockScales(solving.lazy, solving.source, scaled, folds, reasons, solving.comm)
    for chunks in portions:
        with journal.stage(block.index, "forward"):
            collected, notes = block.collector(streams).collect(chunks, partial(_seen, block, chunks, streams))
        journal.notes += notes
        with journal.stage(block.index, "scale"):
            solving.choose(block.index, chunks, collected)
            grams = synchronize_oom(solving.comm, partial(_shrunk, collected, solving.method.expert_shrinkage))
            scales.decide(chunks, grams, solving.cost, solving.quant_of, solving.scale_dtype(chunks[0].site))
    return scales


def _seen(block: Block, chunks: Sequence[SiteChunk], streams: Streams) -> Iterator[Rows]:
    """What every site of these chunks is handed, in a run of the block that is dropped."""
    wanted: dict[str, Site] = {chunk.site.entry: chunk.site for chunk in chunks}
    for arrivals, (_, fold) in zip(streams.quantized.look(block.index), streams.text.batches):
        for arrival in arrivals:
            site = wanted.get(arrival.point.name) if arrival.point.kind == "site" else None
            if site is not None:
                yield Rows(site, fold, arrival.x.reshape(-1, site.in_features), arrival.offsets)


def _shrunk(collected: Sequence[Statistics], shrinkage: float) -> list[Gram]:
    return [shrink_experts(statistics, shrinkage) for statistics in collected]

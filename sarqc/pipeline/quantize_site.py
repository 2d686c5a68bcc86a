"""Solving the chunks of a block, each rank some of them: lambdas first, then codes, and then everybody has all.

A chunk's lambdas are chosen by all ranks together, from the same numbers, and its experts' pool is summed over all of
them on each rank. So the result does not depend on which rank solves a matrix, or beside how many others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sarqc.config import MethodConfig, QuantConfig
from sarqc.method.error_correction import limited_target, weight_change
from sarqc.method.gptq import loss_weight
from sarqc.method.gram import Gram, Statistics
from sarqc.method.hessian import Factor, Objective
from sarqc.method.lambda_search import LambdaChoice, LambdaSearch
from sarqc.method.layer import LayerReport, choose_lambda, merge_reports, solve_site
from sarqc.method.weight import QuantizedWeight
from sarqc.model.lazy_model import LazyModel
from sarqc.model.sites import Site, SiteChunk
from sarqc.model.source import TensorSource
from sarqc.pipeline.channel_scales import BlockScales
from sarqc.pipeline.comm import Comm, exchange, gather, synchronize_oom
from sarqc.pipeline.correction import Correction, Layer, correction_of
from sarqc.pipeline.work_split import WorkItem, work_items

Weights = dict[str, QuantizedWeight]


@dataclass
class SiteQuantizer:
    """What solving a block needs beside its statistics. bit_widths: bits by linear, where layers have different ones.
    choices: of the chunks of the block at work, by name. search: of its sites, by name: the choice of
    the first chunk."""

    lazy: LazyModel
    source: TensorSource
    quant: QuantConfig
    method: MethodConfig
    device: torch.device
    lambda_search: LambdaSearch
    comm: Comm
    bit_widths: Mapping[str, int] | None = None
    choices: dict[str, LambdaChoice] = field(default_factory=dict)
    search: dict[str, LambdaChoice] = field(default_factory=dict)

    def begin(self, lambda_search: LambdaSearch) -> None:
        """Begin a block, or begin it again, with what earlier blocks say of lambdas."""
        self.lambda_search.tracks, self.choices, self.search = lambda_search.copy().tracks, {}, {}

    def choose(self, index: int, chunks: Sequence[SiteChunk], collected: Sequence[Statistics]) -> None:
        """The lambda of each chunk, chosen once in a block; sites of other blocks at the same place share their
        answers. All chunks are of different sites, so none waits for another's answer. Experts that are observed in a
        later pass than the first of their layer take its choice: a layer answers once, however little memory there is.
        """
        for chunk, statistics in zip(chunks, collected):
            if chunk.name in self.choices:
                continue
            if chunk.site.name in self.search:
                first = self.search[chunk.site.name]
                choice = first.of_others(statistics.rows(), chunk.site.in_features, self.method)
            else:
                choice = self.search[chunk.site.name] = self._choice(index, chunk, statistics)
            self.choices[chunk.name] = choice

    def _choice(self, index: int, chunk: SiteChunk, statistics: Statistics) -> LambdaChoice:
        """Made by all ranks together, from the same numbers."""
        return choose_lambda(
            chunk.name,
            chunk.site.name.removeprefix(f"{self.lazy.prefix}.{index}."),
            lambda: synchronize_oom(self.comm, partial(chunk.weight, self.lazy.model)),
            statistics,
            self.quant_of(chunk.site),
            self.method,
            scale_dtype=self.scale_dtype(chunk.site),
            search=replace(self.lambda_search, spread=self._spread),  # adds to the same curves
        )

    def _correction(self, chunk: SiteChunk, statistics: Statistics, *, split: bool) -> Correction:
        """What a layer corrects of the residual error. split: whether ranks split its rows."""
        choice = self.choices[chunk.name]
        if statistics.folds[0].cross_gram is None or choice.rounded or len(statistics.folds) < 2:
            return Correction()
        layer = Layer(chunk.name, statistics, choice.reg_lambda, self.quant_of(chunk.site), self.method)
        return correction_of(layer, self.comm, factors=split)

    def _targets(
        self, todo: Sequence[WorkItem], collected: Sequence[Statistics], corrections: Sequence[Correction]
    ) -> dict[int, tuple[Tensor, float]]:
        """Targets of this rank's items of layers that correct the residual error, by number, with the share of it."""

        def own() -> tuple[dict[int, tuple[Tensor, Tensor, Tensor]], dict[int, Tensor]]:
            mine = {
                number: self._change(item, collected[item.number], corrections[item.number])
                for number, item in enumerate(todo)
                if corrections[item.number].share and item.owner == self.comm.rank
            }
            return mine, {number: sums for number, (_, _, sums) in mine.items()}

        if not any(correction.share for correction in corrections):
            return {}
        mine, gathered = exchange(self.comm, own)
        sums = _merged(gathered)
        targets = {}
        for number, (weight, change, _) in mine.items():
            chunk = todo[number].number
            whole = torch.stack([sums[other] for other in sorted(sums) if todo[other].number == chunk]).sum(0)
            targets[number] = limited_target(weight, change, whole, corrections[chunk].share)
        return targets

    def _change(self, item: WorkItem, statistics: Statistics, correction: Correction) -> tuple[Tensor, Tensor, Tensor]:
        weight, statistics = self._part(item, statistics)
        objective = Objective(statistics.total(), self.choices[item.chunk.name].reg_lambda, correction.plain)
        return weight, *weight_change(item.chunk.name, weight, objective, self.method, correction.share)

    def _part(self, item: WorkItem, statistics: Statistics) -> tuple[Tensor, Statistics]:
        """The weight of an item, and the statistics of its outputs."""
        weight = item.chunk.weight(self.lazy.model)
        return (weight, statistics) if item.rows is None else (weight[:, item.rows], statistics.of_outputs(item.rows))

    def _spread(self, count: int, work: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """As `lambda_search.Spread` has it: every rank does some of the tasks, and all have all values, on the CPU."""
        rank, size = self.comm.rank, self.comm.size
        dealt = [range(first, count, size) for first in range(min(size, count))]
        gathered = gather(self.comm, lambda: work(dealt[rank]).cpu() if rank < len(dealt) else None)
        parts = [part for part in gathered if part is not None]
        values = parts[0].new_empty(count, *parts[0].shape[1:])
        for tasks, part in zip(dealt, parts):
            values[tasks.start :: size] = part
        return values

    def cost(self, chunk: SiteChunk, gram: Gram) -> Tensor:
        """What errors in a chunk's weight cost, for the scale search."""
        objective = Objective(gram, self.choices[chunk.name].reg_lambda)
        return loss_weight(chunk.name, objective, self.quant_of(chunk.site), self.method)

    def quantize(
        self,
        index: int,
        chunks: Sequence[SiteChunk],
        collected: Sequence[Statistics] | None,
        scales: BlockScales | None,
    ) -> tuple[Weights, list[LayerReport]]:
        """All members of these chunks quantized, on the CPU of every rank, and a report of each chunk."""
        if collected is not None:
            self.choose(index, chunks, collected)
        todo = work_items(chunks, self.comm.size, self.device, gram=collected is not None)
        corrections, targets = [Correction() for _ in chunks], {}
        if collected is not None:
            split = todo[0].rows is not None
            corrections = [self._correction(*each, split=split) for each in zip(chunks, collected)]
            for statistics in collected:
                statistics.merge_folds()
            targets = self._targets(todo, collected, corrections)
        factors = [correction.ordered for correction in corrections]
        del corrections  # the plain factors

        def own() -> tuple[dict[int, QuantizedWeight], dict[int, tuple[Layout, LayerReport]]]:
            solved = {
                number: self._solve(
                    item, chunks[item.number], collected, scales, factors[item.number], targets.get(number)
                )
                for number, item in enumerate(todo)
                if item.owner == self.comm.rank
            }
            weights = {number: weight for number, (weight, _) in solved.items()}
            return weights, {number: (layout(weight), report) for number, (weight, report) in solved.items()}

        solved, gathered = exchange(self.comm, own)
        known = _merged(gathered)
        weights: Weights = {}
        reports: list[list[LayerReport]] = [[] for _ in chunks]
        rows: list[QuantizedWeight] = []
        for number, item in enumerate(todo):
            shapes, report = known[number]
            reports[item.number].append(report)
            weight = solved.pop(number) if number in solved else blank(*shapes)
            self.comm.broadcast((weight.codes, weight.scales, weight.zeros), item.owner)
            if item.rows is None:
                weights |= {target.linear: part for target, part in item.chunk.site.split(weight, item.chunk.first)}
            else:
                rows.append(weight)
        if not rows:
            return weights, list(map(merge_reports, reports))
        whole = {target.linear: part for target, part in chunks[0].site.split(_stacked(rows), 0)}
        return whole, [replace(merge_reports(reports[0]), rows=reports[0][0].rows)]

    def _solve(
        self,
        item: WorkItem,
        chunk: SiteChunk,
        collected: Sequence[Statistics] | None,
        scales: BlockScales | None,
        factored: Factor | None,
        target: tuple[Tensor, float] | None,
    ) -> tuple[QuantizedWeight, LayerReport]:
        scaling = scales.of(item.chunk) if scales else None
        if scaling is not None and item.rows is not None:
            scaling = scaling.rows_at(torch.arange(item.rows.start, item.rows.stop, device=self.device))
        choice = statistics = None
        if collected is None:
            weight = item.chunk.weight(self.lazy.model)
        else:
            weight, statistics = self._part(item, collected[item.number])
            experts = slice(item.chunk.first - chunk.first, item.chunk.stop - chunk.first)
            choice = replace(self.choices[chunk.name], experts=experts, target=target, factored=factored)
        solved, report = solve_site(
            chunk.name,
            weight,
            statistics,
            self.quant_of(chunk.site),
            self.method,
            scale_dtype=self.scale_dtype(chunk.site),
            scaling=scaling,
            choice=choice,
        )
        return solved.to("cpu"), report

    def quant_of(self, site: Site) -> QuantConfig:
        """What a site's weights become."""
        first = site.members[0]
        return (
            self.quant.of(first.embedding) if self.bit_widths is None else self.quant.at(self.bit_widths[first.linear])
        )

    def scale_dtype(self, site: Site) -> torch.dtype:
        """What a site's scales are stored in."""
        return scale_dtype(self.source, site.members[0].linear)


def scale_dtype(source: TensorSource, linear: str) -> torch.dtype:
    """What the scales of a Linear are stored in: bf16 where its weights are neither bf16 nor fp16."""
    stored = source.dtype(f"{linear}.weight")
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16


def _stacked(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight of stretches of its rows."""
    codes, scales, zeros = ([getattr(part, name) for part in parts] for name in ("codes", "scales", "zeros"))
    return QuantizedWeight(torch.cat(codes, 1), torch.cat(scales, 1), torch.cat(zeros, 1), parts[0].bits)


Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, int]
"""Shapes of a weight's codes and scales, dtype of its scales, bits."""


def layout(weight: QuantizedWeight) -> Layout:
    """What `blank` needs to know of a weight."""
    return tuple(weight.codes.shape), tuple(weight.scales.shape), weight.scales.dtype, weight.bits


def blank(codes: tuple[int, ...], scales: tuple[int, ...], dtype: torch.dtype, bits: int) -> QuantizedWeight:
    """Room for a weight that another rank has."""
    byte = torch.uint8
    return QuantizedWeight(
        torch.empty(codes, dtype=byte), torch.empty(scales, dtype=dtype), torch.empty(scales, dtype=byte), bits
    )


def _merged(parts: Sequence[dict[int, Any]]) -> dict[int, Any]:
    return {number: value for part in parts for number, value in part.items()}

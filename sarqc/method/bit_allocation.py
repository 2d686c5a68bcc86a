"""Bit allocation: what a site loses at each bit-width, and one bit-width for each unit within an average.

`loss_by_bits` quantizes a few rows of a site at each bit-width on one half of the text and measures them on the other.
`sarqc.pipeline.sensitivity` runs the model once with each site at one bit-width; the ratio of the losses scales that
result to the other bit-widths.

`allocate` solves the multiple-choice knapsack. Only the bit-widths on the lower convex hull of loss over size are worth
taking: a mixture of its neighbours beats any point above it. Every unit starts at its narrowest bit-width, and steps
along the hulls are taken in the order of loss saved per bit. That is optimal for every budget that the steps add up to
exactly. Where the next step no longer fits, cheaper ones that fit are still taken; the answer is off the optimum by
less than the step that did not fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from sarqc.config import MethodConfig, QuantConfig
from sarqc.errors import ArgumentError
from sarqc.method.gram import Gram, Statistics, shrink_experts
from sarqc.method.hessian import Objective
from sarqc.method.lambda_search import HeldOutValidation, LambdaSearch
from sarqc.method.layer import SOLVERS
from sarqc.method.rtn import quantize_rtn
from sarqc.method.weight import QuantizedWeight

SCALE_BITS = 16
"""Bits of a scale on disk: bf16 or fp16."""


@dataclass(frozen=True)
class Unit:
    """Matrices with one bit-width. weights: their number. sizes, losses: bits on disk and loss by bit-width."""

    name: str
    weights: int
    sizes: Mapping[int, int]
    losses: Mapping[int, float]


@dataclass(frozen=True)
class _Step:
    """From the width before on a unit's hull to `width`. gain: loss saved per bit."""

    gain: float
    unit: int
    width: int
    cost: int


def stored_bits(shape: tuple[int, int], width: int, quant: QuantConfig) -> int:
    """Bits on disk of a matrix (N, K) at `width` bits, with scales, zeros and padding to whole words.

    What a format says of the matrix beside them (its shape) is left out, so that one width has its usual average.
    """
    rows, columns = shape
    groups = quant.groups(columns)
    codes = 32 * -(-columns * width // 32)
    zeros = 0 if quant.sym else 32 * -(-rows * width // 32) * groups
    return rows * (codes + SCALE_BITS * groups) + zeros


def average_range(shapes: Iterable[tuple[int, int]], quant: QuantConfig) -> tuple[float, float]:
    """Bits per weight, scales included, of these matrices at the narrowest of `quant.bit_options` and at the widest."""
    kinds = Counter(shapes)
    weights = sum(count * rows * columns for (rows, columns), count in kinds.items())
    narrow, wide = (
        sum(count * stored_bits(shape, width, quant) for shape, count in kinds.items()) / weights
        for width in (min(quant.bit_options), max(quant.bit_options))
    )
    return narrow, wide


def allocate(units: Sequence[Unit], average: float) -> list[int]:
    """The width of each unit, at most `average` bits on disk per weight over all of them.

    Of steps that save as much per bit the first unit's is taken. Raises `ArgumentError` where even the narrowest
    widths take more.
    """
    budget = int(average * sum(unit.weights for unit in units))
    bit_widths = [min(unit.sizes, key=unit.sizes.__getitem__) for unit in units]
    left = budget - sum(unit.sizes[width] for unit, width in zip(units, bit_widths))
    if left < 0:
        least = (budget - left) / sum(unit.weights for unit in units)
        raise ArgumentError(f"avg_bits = {average} is too small: the narrowest widths take {least:.3f} with scales")
    waiting = [step for number, unit in enumerate(units) for step in _hull(number, unit)]
    stuck: set[int] = set()
    for step in sorted(waiting, key=lambda step: (-step.gain, step.unit, step.width)):
        if step.unit in stuck:
            continue
        if step.cost > left:
            stuck.add(step.unit)  # its later steps begin where this one ends
            continue
        bit_widths[step.unit] = step.width
        left -= step.cost
    return bit_widths


def _hull(number: int, unit: Unit) -> list[_Step]:
    """Steps along the lower convex hull of a unit's losses over its sizes, gains falling."""
    points = sorted(unit.sizes, key=unit.sizes.__getitem__)
    hull = points[:1]
    for width in points[1:]:
        if unit.losses[width] >= unit.losses[hull[-1]]:
            continue  # more bits that save nothing
        while len(hull) > 1 and _gain(unit, hull[-1], width) >= _gain(unit, hull[-2], hull[-1]):
            hull.pop()
        hull.append(width)
    return [
        _Step(_gain(unit, before, width), number, width, unit.sizes[width] - unit.sizes[before])
        for before, width in pairwise(hull)
    ]


def _gain(unit: Unit, before: int, width: int) -> float:
    # Two widths of a narrow matrix may fill the same words; then the wider one is free.
    return (unit.losses[before] - unit.losses[width]) / max(unit.sizes[width] - unit.sizes[before], 1)


SOLVED = 4
"""Bit-widths up to this one and up to the probe are quantized to measure their loss."""


def probe_bits(quant: QuantConfig) -> int:
    """The bit-width of the probe: the widest within the average, because most sites end up near it."""
    assert quant.avg_bits is not None
    return max((width for width in quant.bit_options if width <= quant.avg_bits), default=quant.bit_options[0])


def probe_weight(
    site: str,
    weight: Tensor,
    statistics: Statistics,
    quant: QuantConfig,
    method: MethodConfig,
    scale_dtype: torch.dtype,
    experts: slice = slice(None),
) -> QuantizedWeight:
    """The weight [E, N, K] of the probe: quantized without channel scales and coordinate descent, at the prior lambda.

    experts: experts of the site that `weight` covers; statistics cover all of them.
    """
    method = replace(method, cd_passes=0)
    gram = shrink_experts(statistics, method.expert_shrinkage, experts)
    reg_lambda = LambdaSearch().choose("", statistics.rows(), weight.shape[-1], method, None).reg_lambda[experts]
    spec = quant.at(probe_bits(quant))
    return SOLVERS[method.solver](site, weight, Objective(gram, reg_lambda), spec, method, scale_dtype).weight


def loss_by_bits(
    site: str,
    weight: Tensor,
    statistics: Statistics,
    quant: QuantConfig,
    method: MethodConfig,
    scale_dtype: torch.dtype,
    seed: int = 0,
) -> dict[int, float]:
    """tr(E G E^T) on held-out text at each of `quant.bit_options`, without channel scales, on a few rows of a few
    experts of weight [E, N, K].

    Where lambda is "auto" it is the prior's: another one, and coordinate descent, would move all bit-widths of a site
    alike. The widest options are not solved; their loss follows from RTN, because the gain of a solver no longer
    depends on the bit-width there.

    Args:
        site: Name of the site.
        weight: [E, N, K].
        statistics: Two folds: one is fitted on, the other is held out.
        quant: The options.
        method: The method.
        scale_dtype: Dtype that scales are stored in.
        seed: Of the row sample.
    """
    method = replace(method, cd_passes=0)

    def rtn_rows(width: int, rows: Tensor) -> Tensor:
        return quantize_rtn(rows, quant.at(width), "search", scale_dtype).dequantize()

    def solved(width: int, rows: Tensor, gram: Gram, reg_lambda: Tensor) -> Tensor:
        objective = Objective(gram, reg_lambda)
        return SOLVERS[method.solver](site, rows, objective, quant.at(width), method, scale_dtype).weight.dequantize()

    rows = statistics.folds[0].rows
    reg_lambda = float(LambdaSearch().choose("", rows, weight.shape[-1], method, None).reg_lambda.median())
    first = quant.bit_options[0]
    validation = HeldOutValidation(
        weight, statistics, method.expert_shrinkage, seed, partial(solved, first), partial(rtn_rows, first)
    )
    few = [width for width in quant.bit_options if width <= max(SOLVED, probe_bits(quant))] or [first]
    losses: dict[int, float] = {}
    for width in few:
        validation.quantize_rows = partial(solved, width)
        losses[width] = validation.losses([reg_lambda], 0)[0]
    rounded: dict[int, float] = {}
    for width in quant.bit_options[len(few) - 1 :]:
        validation.rtn_rows = partial(rtn_rows, width)
        rounded[width] = validation.rtn_loss(0)
        losses[width] = losses[few[-1]] * (rounded[width] / rounded[few[-1]] if rounded[few[-1]] > 0 else 0.0)
    return losses

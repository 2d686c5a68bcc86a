"""Bits where they help most: one width for each unit, so that the losses add up to the least within a budget.

What is solved is the multiple-choice knapsack. Of a unit's widths only those on the lower convex hull of loss over size
are worth taking: what lies above it is beaten by a mixture of its neighbours. So every unit begins at its narrowest
width, and steps along the hulls are taken in the order of loss saved per bit spent, which is the best that can be done
with each exact amount that the steps add up to. Where the next step no longer fits, cheaper ones that do are still
taken: the answer is off the best by less than the one step that did not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sarqc.errors import ArgumentError
from sarqc.spec import QuantSpec

SCALE_BITS = 16
"""Of a scale on disk: bf16 or fp16."""


@dataclass(frozen=True)
class Unit:
    """Matrices that must have one width. weights: how many weights. sizes: bits on disk by width; losses: by width."""

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


def stored_bits(shape: tuple[int, int], width: int, quant: QuantSpec) -> int:
    """Bits on disk of a matrix (N, K) at `width` bits, with scales, zeros and padding to whole words.

    What a format says of the matrix beside them (its shape) is left out, so that one width has its usual average.
    """
    rows, columns = shape
    groups = quant.groups(columns)
    codes = 32 * -(-columns * width // 32)
    zeros = 0 if quant.sym else 32 * -(-rows * width // 32) * groups
    return rows * (codes + SCALE_BITS * groups) + zeros


def average_range(shapes: Iterable[tuple[int, int]], quant: QuantSpec) -> tuple[float, float]:
    """Bits per weight, scales included, of these matrices at the narrowest of `quant.choices` and at the widest."""
    kinds: dict[tuple[int, int], int] = {}
    for shape in shapes:
        kinds[shape] = kinds.get(shape, 0) + 1
    weights = sum(count * rows * columns for (rows, columns), count in kinds.items())
    narrow, wide = (
        sum(count * stored_bits(shape, width, quant) for shape, count in kinds.items()) / weights
        for width in (min(quant.choices), max(quant.choices))
    )
    return narrow, wide


def allocate(units: Sequence[Unit], average: float) -> list[int]:
    """The width of each unit, at most `average` bits on disk per weight over all of them.

    Of steps that save as much per bit the first unit's is taken. Raises `ArgumentError` where even the narrowest
    widths take more.
    """
    budget = int(average * sum(unit.weights for unit in units))
    widths = [min(unit.sizes, key=unit.sizes.__getitem__) for unit in units]
    left = budget - sum(unit.sizes[width] for unit, width in zip(units, widths))
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
        widths[step.unit] = step.width
        left -= step.cost
    return widths


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

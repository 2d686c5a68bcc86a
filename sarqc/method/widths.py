"""What every width would cost a site: solve a few of its rows with each, on one half of the text, judge on the other.

One width is tried on the model itself, with all rows solved (see `sarqc.model.first_look`): how much the model suffers
from it, times how much more or less the solver loses at another width, is how much the model would suffer there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sarqc.method.held_out import Judge
from sarqc.method.pooling import borrowing
from sarqc.method.solve import SOLVERS, round_plainly
from sarqc.method.statistics import Gram, Statistics
from sarqc.method.strength import Strengths
from sarqc.method.weight import QuantizedWeight
from sarqc.spec import QuantSpec, SolveSpec

SOLVED = 4
"""Widths up to this many bits, and to the one that is tried, are solved to see what they lose."""


@dataclass(frozen=True)
class WidthLosses:
    """tr(E G E^T) on held-out text, by width."""

    by_width: dict[int, float]

    def __add__(self, other: WidthLosses) -> WidthLosses:
        """Those of two parts of a site together."""
        return WidthLosses({width: loss + other.by_width[width] for width, loss in self.by_width.items()})

    def relative(self, width: int) -> dict[int, float]:
        """Losses over that at one width; all 0 where no row excites the weight."""
        unit = self.by_width[width]
        return {each: loss / unit if unit > 0 else 0.0 for each, loss in self.by_width.items()}


def tried_width(quant: QuantSpec) -> int:
    """The width that is tried on the model: the widest within the average, because sites will stay near it."""
    assert quant.avg_bits is not None
    return max((width for width in quant.choices if width <= quant.avg_bits), default=quant.choices[0])


def tried(
    site: str,
    weight: Tensor,
    statistics: Statistics,
    quant: QuantSpec,
    solve: SolveSpec,
    scale_dtype: torch.dtype,
    experts: slice = slice(None),
) -> QuantizedWeight:
    """A weight [E, N, K] as it is tried on the model: solved, without channel scales and sweeps, at the rule's
    strength. experts: those of the site that `weight` is of; statistics are of all of them."""
    solve = replace(solve, sweeps=0)
    gram = borrowing(statistics, solve.borrow, experts)
    strength = Strengths().choose("", statistics.rows(), weight.shape[-1], solve, None).strength[experts]
    spec = quant.at(tried_width(quant))
    return SOLVERS[solve.solver](site, weight, gram, strength, spec, solve, scale_dtype).weight


def width_losses(
    site: str, weight: Tensor, statistics: Statistics, quant: QuantSpec, solve: SolveSpec, scale_dtype: torch.dtype
) -> WidthLosses:
    """The losses of `quant.choices` on a few rows of a few experts of weight [E, N, K], without channel scales.

    statistics: two folds; one is fitted on, the other judges. Where a strength is to be chosen it is the rule's here:
    another one would move all widths of a site alike, and so would sweeps. The widest choices are not solved: they
    lose as much less than the widest that is solved as rounding does, because what a solver gains no longer depends on
    the width there.
    """
    solve = replace(solve, sweeps=0)

    def rounding(width: int, rows: Tensor) -> Tensor:
        return round_plainly(rows, quant.at(width), "search", scale_dtype).dequantize()

    def solved(width: int, rows: Tensor, gram: Gram, strength: Tensor) -> Tensor:
        return SOLVERS[solve.solver](
            site, rows, gram, strength, quant.at(width), solve, scale_dtype
        ).weight.dequantize()

    rows = statistics.folds[0].rows
    strength = float(Strengths().choose("", rows, weight.shape[-1], solve, None).strength.median())
    first = quant.choices[0]
    judge = Judge(weight, statistics, solve.borrow, solve.seed, partial(solved, first), partial(rounding, first))
    few = [width for width in quant.choices if width <= max(SOLVED, tried_width(quant))] or [first]
    losses: dict[int, float] = {}
    for width in few:
        judge.trial = partial(solved, width)
        losses[width] = judge.losses([strength], 0)[0]
    rounded: dict[int, float] = {}
    for width in quant.choices[len(few) - 1 :]:
        judge.rounding = partial(rounding, width)
        rounded[width] = judge.rounding_loss(0)
        losses[width] = losses[few[-1]] * (rounded[width] / rounded[few[-1]] if rounded[few[-1]] > 0 else 0.0)
    return WidthLosses(losses)

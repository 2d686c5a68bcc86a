"""What every width would cost a site: solve a few of its rows with each, on one half of the text, judge on the other.

Losses stand beside that of one plain rounding, because such a rounding is what is tried on the model itself (see
`sarqc.model.first_look`): how much the model suffers from it, times how much less the solver loses at each width, is
how much the model will suffer at that width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sarqc.method.held_out import Judge
from sarqc.method.solve import SOLVERS, round_plainly
from sarqc.method.statistics import Gram, Statistics
from sarqc.method.strength import Strengths
from sarqc.method.weight import QuantizedWeight
from sarqc.spec import QuantSpec, SolveSpec

TRIED = 3
"""Bits of the plain rounding that is tried on the model."""
SOLVED = 4
"""Widths up to this many bits are solved to see what they lose."""


@dataclass(frozen=True)
class WidthLosses:
    """tr(E G E^T) on held-out text. tried: of the rounding that is tried. solved: of the solver, by width."""

    tried: float
    solved: dict[int, float]

    def __add__(self, other: WidthLosses) -> WidthLosses:
        """Those of two parts of a site together."""
        return WidthLosses(
            self.tried + other.tried, {width: loss + other.solved[width] for width, loss in self.solved.items()}
        )

    def relative(self) -> dict[int, float]:
        """Losses by width over that of the rounding; all 0 where no row excites the weight."""
        return {width: loss / self.tried if self.tried > 0 else 0.0 for width, loss in self.solved.items()}


def tried(weight: Tensor, quant: QuantSpec, scale_dtype: torch.dtype) -> QuantizedWeight:
    """A weight [E, N, K] as it is tried on the model."""
    return round_plainly(weight, quant.at(TRIED), "search", scale_dtype)


def width_losses(
    site: str, weight: Tensor, statistics: Statistics, quant: QuantSpec, solve: SolveSpec, scale_dtype: torch.dtype
) -> WidthLosses:
    """The losses of `quant.choices` on a few rows of a few experts of weight [E, N, K], without channel scales.

    statistics: two folds; one is fitted on, the other judges. Where a strength is to be chosen it is the rule's here:
    another one would move all widths of a site alike. Widths beyond `SOLVED` lose as much less than the widest that is
    solved as rounding does: what a solver gains no longer depends on the width there.
    """

    def rounding(width: int, rows: Tensor) -> Tensor:
        return round_plainly(rows, quant.at(width), "search", scale_dtype).dequantize()

    def solved(width: int, rows: Tensor, gram: Gram, strength: Tensor) -> Tensor:
        return SOLVERS[solve.solver](
            site, rows, gram, strength, quant.at(width), solve, scale_dtype
        ).weight.dequantize()

    rows = statistics.folds[0].rows
    strength = float(Strengths().choose("", rows, weight.shape[-1], solve, None).strength.median())
    judge = Judge(weight, statistics, solve.borrow, solve.seed, partial(solved, 0), partial(rounding, TRIED))
    unit = judge.rounding_loss(0)
    few = [width for width in quant.choices if width <= SOLVED] or list(quant.choices[:1])
    losses: dict[int, float] = {}
    for width in few:
        judge.trial = partial(solved, width)
        losses[width] = judge.losses([strength], 0)[0]
    rounded: dict[int, float] = {}
    for width in quant.choices[len(few) - 1 :]:
        judge.rounding = partial(rounding, width)
        rounded[width] = judge.rounding_loss(0)
        losses[width] = losses[few[-1]] * (rounded[width] / rounded[few[-1]] if rounded[few[-1]] > 0 else 0.0)
    return WidthLosses(unit, losses)

"""Judging settings of a solver on text it did not see: solve on one fold of the Gram, measure on the others.

Rows of a weight do not know of each other, so a random few of them suffice; and trials of several strengths stand
side by side on the expert axis, so that they cost one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sarqc.method.pooling import shrunk
from sarqc.method.statistics import Gram, Statistics, together

ROWS = 96
"""Rows of a matrix that a trial solves."""
EXPERTS = 8
"""Experts of a site that a trial solves, evenly spaced in the order of their rows."""
TRIAL_BYTES = 1 << 26
"""Grams of trials that are solved in one call."""

Trial = Callable[[Tensor, Gram, Tensor], Tensor]
"""trial(rows fp32 [E, R, K], Gram of E, strengths fp32 [E]) -> the quantized rows, dequantized to fp32 [E, R, K]."""
Rounding = Callable[[Tensor], Tensor]
"""rounding(rows fp32 [E, R, K]) -> the plainly rounded rows, dequantized to fp32 [E, R, K]."""


class Judge:
    """Rows of one site's weight, drawn with `seed`, and what is needed to solve and to judge them."""

    def __init__(
        self, weight: Tensor, statistics: Statistics, borrow: float, seed: int, trial: Trial, rounding: Rounding
    ) -> None:
        ranked = statistics.rows().argsort(descending=True, stable=True)
        experts: slice | Tensor = slice(None)  # of all, Grams are taken as they are and not copied
        if len(ranked) > EXPERTS:
            experts = ranked[:: -(-len(ranked) // EXPERTS)].sort().values
        rows = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed))[:ROWS].sort().values
        self.weight = weight[experts][:, rows.to(weight.device)]
        rest = statistics.rest or [None] * len(statistics.folds)
        self.fitted = [shrunk(f, borrow, others, experts) for f, others in zip(statistics.folds, rest)]
        self.judging = [fold.part(experts) for fold in statistics.folds]
        self.trial = trial
        self.rounding = rounding

    def losses(self, strengths: Sequence[float], turn: int) -> list[float]:
        """tr(E G E^T), E = W - Q, for each strength, summed over experts and over every fold G but the one that Q was
        fitted on, which is number `turn` in a cycle. G is a sum over rows: experts weigh as much as they are used."""
        experts, _, width = self.weight.shape
        at_once = max(1, TRIAL_BYTES // (4 * experts * width * width))
        return [
            loss
            for start in range(0, len(strengths), at_once)
            for loss in self._side_by_side(strengths[start : start + at_once], turn % len(self.fitted))
        ]

    def rounding_loss(self, turn: int) -> float:
        """The same for plain rounding, in which no fold has a say."""
        return float(self._energy(self.weight - self.rounding(self.weight), turn % len(self.fitted)).sum())

    def _side_by_side(self, strengths: Sequence[float], turn: int) -> list[float]:
        count, experts = len(strengths), len(self.weight)
        each = torch.tensor(strengths, device=self.weight.device).repeat_interleave(experts)
        weight = self.weight.repeat(count, 1, 1)
        error = weight - self.trial(weight, self.fitted[turn].repeat(count), each)
        losses: list[float] = self._energy(error.view(count, experts, *error.shape[1:]), turn).sum(-1).tolist()
        return losses

    def _energy(self, error: Tensor, turn: int) -> Tensor:
        """tr(E G E^T) of error [..., E, R, K] on all folds but number `turn`, float64 [..., E]."""
        gram = together(fold for number, fold in enumerate(self.judging) if number != turn)
        metric = gram.hessian() * gram.rows[:, None, None]
        return ((error @ metric) * error).sum((-2, -1), dtype=torch.float64)

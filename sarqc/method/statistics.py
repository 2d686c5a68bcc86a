"""What is remembered of the inputs of a site: sums that add up over micro-batches, folds and machines.

Nothing here is ever divided before it is read: sums of two halves of the text are the sum of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sarqc_kernels.gram import gram_accumulate_, symmetrize_


@dataclass
class Gram:
    """Second moments of the rows that E experts received; a dense layer is E = 1.

    sum: fp32 [E, K, K], X^T X, of which only the lower triangle is maintained. rows: int64 [E].
    abs_sum: fp32 [E, K], sum of |x_j| over rows.
    """

    sum: Tensor
    rows: Tensor
    abs_sum: Tensor

    @classmethod
    def zeros(cls, experts: int, in_features: int, device: torch.device | str = "cpu") -> Gram:
        """A Gram that has seen nothing."""
        return cls(
            sum=torch.zeros(experts, in_features, in_features, device=device),
            rows=torch.zeros(experts, dtype=torch.int64, device=device),
            abs_sum=torch.zeros(experts, in_features, device=device),
        )

    def add(self, x: Tensor, offsets: Tensor | None = None) -> None:
        """Add rows x [T, K], sorted by expert with offsets [E + 1]; without offsets all rows belong to expert 0."""
        gram_accumulate_(self.sum, self.rows, self.abs_sum, x, offsets)

    def merge(self, other: Gram) -> None:
        """Add what another Gram of the same site has seen."""
        self.sum += other.sum
        self.rows += other.rows
        self.abs_sum += other.abs_sum

    def hessian(self) -> Tensor:
        """X^T X / rows, fp32 [E, K, K], symmetric, in memory of its own; zero for an expert without rows."""
        mean = self.sum / self.rows.clamp(min=1)[:, None, None]
        symmetrize_(mean)
        return mean

    def abs_mean(self) -> Tensor:
        """E|x_j|, fp32 [E, K]; zero for an expert without rows."""
        return self.abs_sum / self.rows.clamp(min=1)[:, None]


@dataclass
class Statistics:
    """The Grams of one site, one for each fold of the calibration text.

    Folds are stretches of text far apart from each other, so that what is fitted on one can be judged on another.
    """

    folds: tuple[Gram, ...]

    @classmethod
    def zeros(cls, experts: int, in_features: int, folds: int = 1, device: torch.device | str = "cpu") -> Statistics:
        """Statistics that have seen nothing."""
        return cls(tuple(Gram.zeros(experts, in_features, device) for _ in range(folds)))

    def add(self, x: Tensor, offsets: Tensor | None = None, fold: int = 0) -> None:
        """Add rows to one fold; shapes as in `Gram.add`."""
        self.folds[fold].add(x, offsets)

    def total(self) -> Gram:
        """All folds together; the only fold itself where there is one."""
        if len(self.folds) == 1:
            return self.folds[0]
        first = self.folds[0]
        total = Gram(first.sum.clone(), first.rows.clone(), first.abs_sum.clone())
        for fold in self.folds[1:]:
            total.merge(fold)
        return total

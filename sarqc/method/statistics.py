"""What is remembered of the inputs of a site: sums that add up over micro-batches, folds and machines.

Nothing here is ever divided before it is read: sums of two halves of the text are the sum of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sarqc_kernels.gram import gram_accumulate_, symmetrize_


@dataclass
class Gram:
    """Second moments of the rows that E experts received; a dense layer is E = 1.

    sum: fp32 [E, K, K], X^T X, of which only the lower triangle is maintained. rows: int64 [E].
    abs_sum: fp32 [E, K], sum of |x_j| over rows. wish: fp32 [1, N, K], R^T X where each row of R is what the
    output of that row of X should gain; None where nothing is asked of the outputs.
    """

    sum: Tensor
    rows: Tensor
    abs_sum: Tensor
    wish: Tensor | None = None

    @classmethod
    def zeros(cls, experts: int, in_features: int, device: torch.device | str = "cpu", *, wishes: int = 0) -> Gram:
        """A Gram that has seen nothing. wishes: N of a dense layer (E = 1) of whose outputs something is asked."""
        return cls(
            sum=torch.zeros(experts, in_features, in_features, device=device),
            rows=torch.zeros(experts, dtype=torch.int64, device=device),
            abs_sum=torch.zeros(experts, in_features, device=device),
            wish=torch.zeros(1, wishes, in_features, device=device) if wishes else None,
        )

    def add(self, x: Tensor, offsets: Tensor | None = None, wish: Tensor | None = None) -> None:
        """Add rows x [T, K], sorted by expert with offsets [E + 1]; without offsets all rows belong to expert 0.

        wish: what the outputs of these rows should gain, [T, N], where that is kept.
        """
        gram_accumulate_(self.sum, self.rows, self.abs_sum, x, offsets)
        if self.wish is not None and wish is not None:
            self.wish[0].addmm_(wish.float().T, x.float())

    def merge(self, other: Gram) -> None:
        """Add what another Gram of the same site has seen."""
        self.sum += other.sum
        self.rows += other.rows
        self.abs_sum += other.abs_sum
        if self.wish is not None and other.wish is not None:
            self.wish += other.wish

    def part(self, experts: slice | Tensor) -> Gram:
        """Some experts: a stretch, in the same memory (the Gram itself where it is all of them), or those of numbers
        int64, in that order and in memory of their own."""
        if isinstance(experts, slice) and experts == slice(None):
            return self
        wish = None if self.wish is None else self.wish[experts]
        return Gram(self.sum[experts], self.rows[experts], self.abs_sum[experts], wish)

    def tensors(self) -> list[Tensor]:
        """Everything in it: sums, each of them."""
        return [self.sum, self.rows, self.abs_sum] + ([] if self.wish is None else [self.wish])

    def repeat(self, times: int) -> Gram:
        """All experts so many times over: expert e of repetition r is number r * E + e."""
        return Gram(self.sum.repeat(times, 1, 1), self.rows.repeat(times), self.abs_sum.repeat(times, 1))

    def hessian(self) -> Tensor:
        """X^T X / rows, fp32 [E, K, K], symmetric, in memory of its own; zero for an expert without rows."""
        mean = self.sum / self.rows.clamp(min=1)[:, None, None]
        symmetrize_(mean)
        return mean

    def diagonal(self) -> Tensor:
        """diag(X^T X / rows), fp32 [E, K]; zero for an expert without rows."""
        return self.sum.diagonal(dim1=-2, dim2=-1) / self.rows.clamp(min=1)[:, None]

    def wished(self) -> Tensor:
        """R^T X / rows, fp32 [1, N, K]; needs `wish`."""
        assert self.wish is not None
        return self.wish / self.rows.clamp(min=1)[:, None, None]

    def abs_mean(self) -> Tensor:
        """E|x_j|, fp32 [E, K]; zero for an expert without rows."""
        return self.abs_sum / self.rows.clamp(min=1)[:, None]


@dataclass
class Statistics:
    """The Grams of one site, one for each fold of the calibration text.

    Folds are stretches of text far apart from each other, so that what is fitted on one can be judged on another.
    rest: where these are some of a layer's experts, what all others saw, as one expert (E = 1) in each fold.
    """

    folds: tuple[Gram, ...]
    rest: tuple[Gram, ...] = ()

    @classmethod
    def zeros(
        cls,
        experts: int,
        in_features: int,
        folds: int = 1,
        device: torch.device | str = "cpu",
        *,
        rest: bool = False,
        wishes: int = 0,
    ) -> Statistics:
        """Statistics that have seen nothing."""
        return cls(
            tuple(Gram.zeros(experts, in_features, device, wishes=wishes) for _ in range(folds)),
            tuple(Gram.zeros(1, in_features, device) for _ in range(folds if rest else 0)),
        )

    def add(self, x: Tensor, offsets: Tensor | None = None, fold: int = 0, *, wish: Tensor | None = None) -> None:
        """Add rows to one fold; shapes as in `Gram.add`."""
        self.folds[fold].add(x, offsets, wish)

    def add_rest(self, x: Tensor, fold: int = 0) -> None:
        """Add rows x [T, K] that went to other experts of the layer, if those are kept."""
        if self.rest:
            self.rest[fold].add(x)

    def tensors(self, fold: int) -> list[Tensor]:
        """All sums of one fold."""
        return [tensor for grams in (self.folds, self.rest) if grams for tensor in grams[fold].tensors()]

    def rows(self) -> Tensor:
        """Rows of each expert in all folds, int64 [E]."""
        return torch.stack([fold.rows for fold in self.folds]).sum(0)

    def merge_folds(self) -> None:
        """Make one fold of all, in the memory of the first; `total` is the same as before, bit for bit."""
        for grams in (self.folds, self.rest):
            for other in grams[1:]:
                grams[0].merge(other)
        self.folds, self.rest = self.folds[:1], self.rest[:1]

    def total(self) -> Gram:
        """All folds together; the only fold itself where there is one."""
        return together(self.folds)

    def in_one(self) -> Statistics:
        """The same with all folds as one: these themselves where there is one, otherwise in memory of their own."""
        return Statistics((self.total(),), (together(self.rest),) if self.rest else ())

    def total_rest(self) -> Gram | None:
        """The same of what other experts saw."""
        return together(self.rest) if self.rest else None


def together(folds: Iterable[Gram]) -> Gram:
    """The sum of Grams of one site: the only one itself where there is one, otherwise in memory of its own."""
    first, *others = folds
    if not others:
        return first
    wish = None if first.wish is None else first.wish.clone()
    total = Gram(first.sum.clone(), first.rows.clone(), first.abs_sum.clone(), wish)
    for other in others:
        total.merge(other)
    return total

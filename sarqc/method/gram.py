"""Calibration statistics of a site: Grams that add up over micro-batches, folds and ranks.

A Gram is a raw sum and is divided only when it is read. `shrunk` and `shrink_experts` shrink the Grams of experts with few
rows towards the layer's pooled Gram. `finite_rows` and `shortening` keep non-finite and outlier rows out of the sums.

An expert that saw few tokens is shrunk towards the layer's pool, by as many rows as kappa says:

    H_e = (G_e + kappa * H_pool) / (n_e + kappa),    H_pool = sum_e G_e / sum_e n_e

(a credibility estimate). An expert without tokens gets H_pool, one with many keeps its own, with no case between. For
gate and up H_pool is exactly the average over the layer's tokens, each counted once for every expert it went to. For
down it is the average over what experts made of their own tokens, which stands in for what this expert would have
made of all of them: that would cost a forward of every token through every expert.
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
    abs_sum: fp32 [E, K], sum of |x_j| over rows. cross_gram: fp32 [1, N, K], R^T X where each row of R is what the
    output of that row of X should gain; None where nothing is asked of the outputs.
    """

    sum: Tensor
    rows: Tensor
    abs_sum: Tensor
    cross_gram: Tensor | None = None

    @classmethod
    def zeros(cls, experts: int, in_features: int, device: torch.device | str = "cpu", *, cross_rows: int = 0) -> Gram:
        """A Gram that has seen nothing. cross_rows: N of a dense layer (E = 1) of whose outputs something is asked."""
        return cls(
            sum=torch.zeros(experts, in_features, in_features, device=device),
            rows=torch.zeros(experts, dtype=torch.int64, device=device),
            abs_sum=torch.zeros(experts, in_features, device=device),
            cross_gram=torch.zeros(1, cross_rows, in_features, device=device) if cross_rows else None,
        )

    def add(self, x: Tensor, offsets: Tensor | None = None, cross_gram: Tensor | None = None) -> None:
        """Add rows x [T, K], sorted by expert with offsets [E + 1]; without offsets all rows belong to expert 0.

        cross_gram: what the outputs of these rows should gain, [T, N], where that is kept.
        """
        gram_accumulate_(self.sum, self.rows, self.abs_sum, x, offsets)
        if self.cross_gram is not None and cross_gram is not None:
            self.cross_gram[0].addmm_(cross_gram.float().T, x.float())

    def merge(self, other: Gram) -> None:
        """Add what another Gram of the same site has seen."""
        self.sum += other.sum
        self.rows += other.rows
        self.abs_sum += other.abs_sum
        if self.cross_gram is not None and other.cross_gram is not None:
            self.cross_gram += other.cross_gram

    def part(self, experts: slice | Tensor) -> Gram:
        """Some experts: a stretch, in the same memory (the Gram itself where it is all of them), or those of numbers
        int64, in that order and in memory of their own."""
        if isinstance(experts, slice) and experts == slice(None):
            return self
        cross_gram = None if self.cross_gram is None else self.cross_gram[experts]
        return Gram(self.sum[experts], self.rows[experts], self.abs_sum[experts], cross_gram)

    def tensors(self) -> list[Tensor]:
        """Everything in it: sums, each of them."""
        return [self.sum, self.rows, self.abs_sum] + ([] if self.cross_gram is None else [self.cross_gram])

    def repeat(self, times: int) -> Gram:
        """All experts so many times over: expert e of repetition r is number r * E + e."""
        return Gram(self.sum.repeat(times, 1, 1), self.rows.repeat(times), self.abs_sum.repeat(times, 1))

    def second_moment(self) -> Tensor:
        """X^T X / rows, fp32 [E, K, K], symmetric, in memory of its own; zero for an expert without rows."""
        mean = self.sum / self.rows.clamp(min=1)[:, None, None]
        symmetrize_(mean)
        return mean

    def diagonal(self) -> Tensor:
        """diag(X^T X / rows), fp32 [E, K]; zero for an expert without rows."""
        return self.sum.diagonal(dim1=-2, dim2=-1) / self.rows.clamp(min=1)[:, None]

    def cross_mean(self) -> Tensor:
        """R^T X / rows, fp32 [1, N, K]; needs `cross_gram`."""
        assert self.cross_gram is not None
        return self.cross_gram / self.rows.clamp(min=1)[:, None, None]

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
        cross_rows: int = 0,
    ) -> Statistics:
        """Statistics that have seen nothing."""
        return cls(
            tuple(Gram.zeros(experts, in_features, device, cross_rows=cross_rows) for _ in range(folds)),
            tuple(Gram.zeros(1, in_features, device) for _ in range(folds if rest else 0)),
        )

    def add(self, x: Tensor, offsets: Tensor | None = None, fold: int = 0, *, cross_gram: Tensor | None = None) -> None:
        """Add rows to one fold; shapes as in `Gram.add`."""
        self.folds[fold].add(x, offsets, cross_gram)

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
    cross_gram = None if first.cross_gram is None else first.cross_gram.clone()
    total = Gram(first.sum.clone(), first.rows.clone(), first.abs_sum.clone(), cross_gram)
    for other in others:
        total.merge(other)
    return total


def prior_rows(in_features: int, shrinkage: float) -> int:
    """Rows to borrow where `shrinkage` is a share of a row for each input."""
    return round(shrinkage * in_features)


def shrunk(gram: Gram, shrinkage: float, others: Gram | None = None, experts: slice | Tensor = slice(None)) -> Gram:
    """The Gram in which each expert has kappa rows of the pool added to its own; a dense layer (E = 1) is its pool.

    gram: of E experts. others: of the experts of the layer that are not in `gram`, summed to one.
    experts: which of E to return, a stretch or their numbers int64; the pool is the same whichever they are. Returns
    those of `gram` as they are where nothing is to be borrowed or no expert saw a row.
    """
    parts = [gram] if others is None else [gram, others]
    rows = sum(int(part.rows.sum()) for part in parts)
    added = prior_rows(gram.sum.shape[-1], shrinkage)
    if added == 0 or rows == 0 or (others is None and len(gram.rows) == 1):
        return gram.part(experts)
    own = gram.part(experts)
    return Gram(
        sum=own.sum + torch.stack([part.sum.sum(0) for part in parts]).sum(0) * (added / rows),
        rows=own.rows + added,
        abs_sum=own.abs_sum + torch.stack([part.abs_sum.sum(0) for part in parts]).sum(0) * (added / rows),
    )


def shrink_experts(statistics: Statistics, shrinkage: float, experts: slice = slice(None)) -> Gram:
    """All folds together, each of the `experts` with its rows from the pool of the whole layer."""
    return shrunk(statistics.total(), shrinkage, statistics.total_rest(), experts)


MAX_LOST = 0.01
"""Share of the rows that may be left out of the statistics. A few tokens that overflow say little about a layer;
more of them say that the model, its dtype or the text is not sound."""


LONGEST = 2.0
"""Length of the longest row there may be, in medians of its window. The token that a model rests its attention on can
have a row 500 times as long as others in front of a `down_proj`, and is then 99.8 % of the layer's Gram."""


def shortening(x: Tensor, window: int) -> Tensor:
    """What rows of x [T, K], in windows of so many, are to be multiplied by, [T, 1]: 1 but for those that are too long.

    A row with NaN or Inf gets something that leaves it with NaN or Inf.
    """
    length = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).view(-1, window)
    most = LONGEST * length.nanmedian(-1, keepdim=True).values
    factor: Tensor = (most / length).clamp(max=1).nan_to_num(1.0)
    return factor.view(-1, 1).to(x.dtype)


def finite_rows(x: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The rows of x [T, K] without NaN and Inf, with the offsets int64 [E + 1] that they then have."""
    keep = torch.isfinite(x).all(-1)
    if offsets is None:
        return x[keep], None
    counted = torch.cat([offsets.new_zeros(1), keep.cumsum(0)])
    return x[keep], counted[offsets]


def lost_rows(hidden: Tensor) -> int:
    """How many rows of [..., K] hold NaN or Inf."""
    return int((~torch.isfinite(hidden)).any(-1).sum())

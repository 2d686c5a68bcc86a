"""Calibration statistics of a site: Grams that add up over micro-batches, folds and ranks.

A Gram is a raw sum and is divided only when it is read.

An expert with few rows has a noisy Gram, so it is shrunk towards the pooled Hessian of its layer by kappa rows:

    H_e = (G_e + kappa * H_pool) / (n_e + kappa),    H_pool = sum_e G_e / sum_e n_e

(a credibility estimate). An expert without tokens gets H_pool, one with many keeps its own, and no case is special. For
gate and up, H_pool is exactly the average over the layer's tokens, each counted once per expert that it is routed to.
For down it is the average over what experts made of their own tokens; the exact average would need a forward of every
token through every expert.

`finite_rows` and `row_scales` keep non-finite and outlier rows out of the sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sarqc_kernels.gram import cross_gram_accumulate_, gram_accumulate_, gram_finalize


@dataclass
class Gram:
    """Raw second moments of the rows that E experts received; a dense layer is E = 1.

    Attributes:
        sum: X^T X, fp32 [E, K, K]; only the lower triangle is maintained.
        rows: int64 [E].
        abs_sum: Sum of |x_j| over rows, fp32 [E, K].
        cross_gram: R^T X, fp32 [1, N, K], where row R_i is the residual error that the output of row X_i should
            correct; None where no error is corrected.
    """

    sum: Tensor
    rows: Tensor
    abs_sum: Tensor
    cross_gram: Tensor | None = None

    @classmethod
    def zeros(cls, experts: int, in_features: int, device: torch.device | str = "cpu", *, cross_rows: int = 0) -> Gram:
        """An empty Gram of `experts` matrices [`in_features`, `in_features`] on `device`.

        cross_rows: N of a dense layer (E = 1) whose `cross_gram` is kept, else 0.
        """
        return cls(
            sum=torch.zeros(experts, in_features, in_features, device=device),
            rows=torch.zeros(experts, dtype=torch.int64, device=device),
            abs_sum=torch.zeros(experts, in_features, device=device),
            cross_gram=torch.zeros(1, cross_rows, in_features, device=device) if cross_rows else None,
        )

    def add(self, x: Tensor, offsets: Tensor | None = None, residual: Tensor | None = None) -> None:
        """Add rows `x` [T, K], sorted by expert with `offsets` [E + 1]; without them all rows belong to expert 0.

        residual: the residual error R of these rows, [T, N], where `cross_gram` is kept.
        """
        gram_accumulate_(self.sum, self.rows, self.abs_sum, x, offsets)
        if self.cross_gram is not None and residual is not None:
            cross_gram_accumulate_(self.cross_gram[0], residual, x)

    def merge(self, other: Gram) -> None:
        """Add `other`, a Gram of the same site."""
        self.sum += other.sum
        self.rows += other.rows
        self.abs_sum += other.abs_sum
        if self.cross_gram is not None and other.cross_gram is not None:
            self.cross_gram += other.cross_gram

    def part(self, experts: slice | Tensor) -> Gram:
        """These `experts`: a range in the same memory (the Gram itself where it is all of them), or experts by number,
        int64, in that order and in memory of their own.
        """
        if isinstance(experts, slice) and experts == slice(None):
            return self
        cross_gram = None if self.cross_gram is None else self.cross_gram[experts]
        return Gram(self.sum[experts], self.rows[experts], self.abs_sum[experts], cross_gram)

    def of_outputs(self, rows: slice) -> Gram:
        """The same for the outputs `rows` of a dense layer, in the same memory."""
        return self if self.cross_gram is None else replace(self, cross_gram=self.cross_gram[:, rows])

    def tensors(self) -> list[Tensor]:
        """All sums: of X^T X strips of its rows, as far as the lower triangle reaches in each."""
        lower = [self.sum[:, first:last, :last] for first, last in strips(self.sum.shape[-1])]
        return [*lower, self.rows, self.abs_sum] + ([] if self.cross_gram is None else [self.cross_gram])

    def second_moment(self) -> Tensor:
        """X^T X / rows, fp32 [E, K, K], symmetric, in memory of its own; zero for an expert without rows."""
        nothing = torch.zeros_like(self.abs_sum)
        return gram_finalize(self.sum, self.rows, nothing, nothing[:, 0], 0.0)

    def energy(self, rows: Tensor) -> Tensor:
        """tr(R X^T X R^T) of R = `rows`, fp32 [E, N, K], in fp32 products summed in fp64: float64 [E].

        Of a dense layer's Gram `rows` may be several matrices.
        """
        total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for first, last in strips(rows.shape[-1]):
            own, strip = rows[..., first:last], self.sum[:, first:last]
            corner = strip[..., first:last].tril()
            mirrored = corner + corner.tril(-1).mT
            total += ((own @ mirrored) * own).sum((-2, -1), dtype=torch.float64)
            if first:
                below = (own @ strip[..., :first]) * rows[..., :first]
                total += 2 * below.sum((-2, -1), dtype=torch.float64)
        return total

    def diagonal(self) -> Tensor:
        """diag(X^T X / rows), fp32 [E, K]; zero for an expert without rows."""
        return self.sum.diagonal(dim1=-2, dim2=-1) / self.rows.clamp(min=1)[:, None]

    def cross_mean(self, step: int = 1) -> Tensor:
        """Every `step`-th row of R^T X / rows, fp32 [1, N / step, K]; needs `cross_gram`."""
        assert self.cross_gram is not None
        return self.cross_gram[:, ::step] / self.rows.clamp(min=1)[:, None, None]

    def abs_mean(self) -> Tensor:
        """E|x_j|, fp32 [E, K]; zero for an expert without rows."""
        return self.abs_sum / self.rows.clamp(min=1)[:, None]


@dataclass
class Statistics:
    """The Grams of one site, one for each fold of the calibration text.

    Folds are parts of the text far from each other, so that a fit on one can be validated on another. rest: where these
    are some experts of a layer, the sum over all other experts, as one expert (E = 1) in each fold.
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
        """Empty statistics."""
        return cls(
            tuple(Gram.zeros(experts, in_features, device, cross_rows=cross_rows) for _ in range(folds)),
            tuple(Gram.zeros(1, in_features, device) for _ in range(folds if rest else 0)),
        )

    def add(self, x: Tensor, offsets: Tensor | None = None, fold: int = 0, *, residual: Tensor | None = None) -> None:
        """Add rows to one fold; shapes as in `Gram.add`."""
        self.folds[fold].add(x, offsets, residual)

    def add_rest(self, x: Tensor, fold: int = 0) -> None:
        """Add rows x [T, K] of other experts of the layer, if those are kept."""
        if self.rest:
            self.rest[fold].add(x)

    def tensors(self, fold: int) -> list[Tensor]:
        """All sums of one fold."""
        return [tensor for grams in (self.folds, self.rest) if grams for tensor in grams[fold].tensors()]

    def of_outputs(self, rows: slice) -> Statistics:
        """The same for the outputs `rows` of a dense layer, in the same memory."""
        return replace(self, folds=tuple(fold.of_outputs(rows) for fold in self.folds))

    def rows(self) -> Tensor:
        """Rows of each expert in all folds, int64 [E]."""
        return torch.stack([fold.rows for fold in self.folds]).sum(0)

    def merge_folds(self) -> None:
        """Merge all folds in the memory of the first; `total` keeps every bit."""
        for grams in (self.folds, self.rest):
            for other in grams[1:]:
                grams[0].merge(other)
        self.folds, self.rest = self.folds[:1], self.rest[:1]

    def total(self) -> Gram:
        """The sum of all folds; the only fold itself where there is one."""
        return merged(self.folds)

    def as_single_fold(self) -> Statistics:
        """The same with one fold: itself where there is one, otherwise in memory of its own."""
        return Statistics((self.total(),), (merged(self.rest),) if self.rest else ())

    def total_rest(self) -> Gram | None:
        """The sum of all folds of `rest`."""
        return merged(self.rest) if self.rest else None


def merged(folds: Iterable[Gram]) -> Gram:
    """The sum of Grams of one site: the only one itself where there is one, otherwise in memory of its own."""
    first, *others = folds
    if not others:
        return first
    cross_gram = None if first.cross_gram is None else first.cross_gram.clone()
    total = Gram(first.sum.clone(), first.rows.clone(), first.abs_sum.clone(), cross_gram)
    for other in others:
        total.merge(other)
    return total


def strips(inputs: int) -> Iterator[tuple[int, int]]:
    """Begin and end of strips of the rows of a matrix [K, K]: up to 8, as high as each other, of at least 128 rows."""
    height = max(128, -(-inputs // 8))
    return ((first, min(first + height, inputs)) for first in range(0, inputs, height))


def prior_rows(in_features: int, shrinkage: float) -> int:
    """Rows of the pooled Gram to add; `shrinkage` is a fraction of a row for each input."""
    return round(shrinkage * in_features)


def shrink_gram(
    gram: Gram, shrinkage: float, others: Gram | None = None, experts: slice | Tensor = slice(None)
) -> Gram:
    """The Gram in which each expert has kappa rows of the pooled Gram added; a dense layer (E = 1) is its own pool.

    Args:
        gram: Of E experts.
        shrinkage: kappa / K.
        others: Sum over the experts of the layer that are not in `gram`.
        experts: Which of E to return, a range or numbers int64. The pool does not depend on it.

    Returns:
        The experts of `gram` unchanged where kappa is 0 or no expert saw a row.
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
    """The sum of all folds, each of `experts` shrunk towards the pooled Gram of the whole layer."""
    return shrink_gram(statistics.total(), shrinkage, statistics.total_rest(), experts)


MAX_LOST = 0.01
"""Largest share of non-finite rows that are left out. A few tokens that overflow say little about a layer; more of them
mean that the model, its dtype or the text is broken.
"""


LONGEST = 2.0
"""Largest row norm, in medians of its window. An attention-sink token can have a row 500 times as long as others at the
input of a `down_proj`, and then makes up 99.8 % of the layer's Gram.
"""


def row_scales(x: Tensor, window: int) -> Tensor:
    """Factors [T, 1] for the rows of x [T, K] in sequences of `window` rows: below 1 for rows longer than `LONGEST`
    medians.

    A row with NaN or Inf keeps its NaN or Inf.
    """
    length = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).view(-1, window)
    most = LONGEST * length.nanmedian(-1, keepdim=True).values
    factor: Tensor = (most / length).clamp(max=1).nan_to_num(1.0)
    return factor.view(-1, 1).to(x.dtype)


def finite_rows(x: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The rows of x [T, K] without NaN and Inf, and the offsets int64 [E + 1] that they then have."""
    keep = torch.isfinite(x).all(-1)
    if offsets is None:
        return x[keep], None
    counted = torch.cat([offsets.new_zeros(1), keep.cumsum(0)])
    return x[keep], counted[offsets]


def all_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor Inf, by the least and the largest: NaN is both. On a CPU a tenth of the time of
    `isfinite` on each, and nothing is made that is as large as `values`."""
    return bool(torch.isfinite(torch.stack(values.aminmax())).all())


def non_finite_rows(hidden: Tensor) -> int:
    """Number of rows of [..., K] with NaN or Inf."""
    return 0 if all_finite(hidden) else int((~torch.isfinite(hidden)).any(-1).sum())

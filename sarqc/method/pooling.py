"""What an expert that saw few tokens borrows from the others: kappa rows of the average input of its layer.

    H_e = (G_e + kappa * H_pool) / (n_e + kappa),    H_pool = sum_e G_e / sum_e n_e

(a credibility estimate). An expert without tokens gets H_pool, one with many keeps its own, with no case between. For
gate and up H_pool is exactly the average over the layer's tokens, each counted once for every expert it went to. For
down it is the average over what experts made of their own tokens, which stands in for what this expert would have
made of all of them: that would cost a forward of every token through every expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sarqc.method.statistics import Gram, Statistics


def kappa(in_features: int, borrow: float) -> int:
    """Rows to borrow where `borrow` is a share of a row for each input."""
    return round(borrow * in_features)


def shrunk(gram: Gram, borrow: float, others: Gram | None = None, experts: slice | Tensor = slice(None)) -> Gram:
    """The Gram in which each expert has kappa rows of the pool added to its own; a dense layer (E = 1) is its pool.

    gram: of E experts. others: of the experts of the layer that are not in `gram`, summed to one.
    experts: which of E to return, a stretch or their numbers int64; the pool is the same whichever they are. Returns
    those of `gram` as they are where nothing is to be borrowed or no expert saw a row.
    """
    parts = [gram] if others is None else [gram, others]
    rows = sum(int(part.rows.sum()) for part in parts)
    added = kappa(gram.sum.shape[-1], borrow)
    if added == 0 or rows == 0 or (others is None and len(gram.rows) == 1):
        return gram.part(experts)
    own = gram.part(experts)
    return Gram(
        sum=own.sum + torch.stack([part.sum.sum(0) for part in parts]).sum(0) * (added / rows),
        rows=own.rows + added,
        abs_sum=own.abs_sum + torch.stack([part.abs_sum.sum(0) for part in parts]).sum(0) * (added / rows),
    )


def borrowing(statistics: Statistics, borrow: float, experts: slice = slice(None)) -> Gram:
    """All folds together, each of the `experts` with its rows from the pool of the whole layer."""
    return shrunk(statistics.total(), borrow, statistics.total_rest(), experts)

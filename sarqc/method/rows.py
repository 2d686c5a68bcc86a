"""Rows of activations that would spoil a sum: those with NaN or Inf are taken out, and never without being counted;
those that are much longer than all others are made shorter."""

from __future__ import annotations

import torch
from torch import Tensor

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

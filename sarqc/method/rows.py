"""Rows of activations that hold NaN or Inf: taken out, and never without being counted."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOST = 0.01
"""Share of the rows that may be left out of the statistics. A few tokens that overflow say little about a layer;
more of them say that the model, its dtype or the text is not sound."""


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

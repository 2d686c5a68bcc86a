"""Which tokens go to which experts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Routing"]


class Routing(NamedTuple):
    """Which tokens go to which experts, R = T k rows sorted by expert.

    offsets: int64 [E + 1], expert e has rows offsets[e] .. offsets[e + 1] - 1. tokens: int64 [R], the token behind each
    row. slots: int64 [k, T], the rows of each token in the order in which they are added. weights: floating [R], the
    router's weight of each row.
    """

    offsets: Tensor
    tokens: Tensor
    slots: Tensor
    weights: Tensor

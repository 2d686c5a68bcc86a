"""Where hidden states are kept between two blocks, as the loop over blocks sees it.

This room knows no files. Whoever runs the loop may hand in an object that puts states elsewhere than into memory; what
is computed with them is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Room(Protocol):
    """Makes tensors on the host, and is told which parts of them nobody needs for a while."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> Tensor:
        """An uninitialised tensor. pinned: it will be copied to a GPU and back."""

    def leave(self, part: Tensor) -> None:
        """`part`, of a tensor made here, stays as it is until it is next looked at."""


class Memory:
    """Everything is in memory."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> Tensor:
        """In pinned memory where a GPU takes from it."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=pinned)

    def leave(self, part: Tensor) -> None:
        """It stays where it is."""


MEMORY = Memory()

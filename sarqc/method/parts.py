"""A tensor that is handed on piece by piece, for those that one would rather not have in memory twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """shape: of the whole, [S, ...]. each(): its pieces [n, ...] on the CPU in order, n >= 1; it may be asked again,
    and a piece may be overwritten once the next one is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    each: Callable[[], Iterator[Tensor]]

    @classmethod
    def of(cls, whole: Tensor) -> Parts:
        """A tensor that is in memory, as its one piece."""
        return cls(tuple(whole.shape), whole.dtype, lambda: iter([whole]))

    def rows(self) -> Iterator[Tensor]:
        """Its S rows [...] one by one."""
        for part in self.each():
            yield from part

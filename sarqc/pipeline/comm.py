"""The ranks of a run, as the loop over blocks sees them: who am I, and how do we put together what each of us has.

Every rank runs the same loop. It has windows of its own, so what it sees of a site's inputs is a part of a sum; and it
solves matrices of its own, so it needs the others' codes. One process is a group of one, for which all of this is
nothing to do: the loop does not ask how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sarqc.errors import ResourceError, out_of_memory

_Value = TypeVar("_Value")


class Comm(Protocol):
    """Ranks 0 .. size - 1. All of them call the same methods in the same order, but for `recv_previous` and `send_next`.

    ordered: whether sums are made in the order of one process, so that they have its bits: each rank goes on from what
    the rank before hands it. Otherwise all ranks sum at once, and then their sums are added.
    """

    @property
    def rank(self) -> int:
        """Number of this process."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def ordered(self) -> bool:
        """See above."""

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, which has the same bits on each."""

    def recv_previous(self, tensors: Sequence[Tensor]) -> None:
        """Fill tensors with what the rank before hands on; the first rank keeps what it has."""

    def send_next(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors to the next rank; the last one has none."""

    def broadcast(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Fill tensors with those of rank `owner`; shapes and dtypes are the same everywhere."""

    def all_gather_object(self, value: _Value) -> list[_Value]:
        """A small value of each rank, on all of them: tensors in it are on the CPU."""

    def gather_rows(self, rows: Iterator[Tensor], places: Sequence[Tensor]) -> Iterator[Tensor]:
        """On rank 0 the rows [1, ...] of all ranks in the order of their numbers, elsewhere nothing.

        rows: this rank's. places: numbers of the rows of each rank, rising. All ranks have to go through to the end;
        what is handed out may be overwritten by the next.
        """


class SingleProcess:
    """One process."""

    rank, size, ordered = 0, 1, False

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """They are the sum."""

    def recv_previous(self, tensors: Sequence[Tensor]) -> None:
        """Nobody is before."""

    def send_next(self, tensors: Sequence[Tensor]) -> None:
        """Nobody is next."""

    def broadcast(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Everybody has them."""

    def all_gather_object(self, value: _Value) -> list[_Value]:
        """The value."""
        return [value]

    def gather_rows(self, rows: Iterator[Tensor], places: Sequence[Tensor]) -> Iterator[Tensor]:
        """The rows, which are all there are."""
        return rows


SINGLE_PROCESS = SingleProcess()


def synchronize_oom(comm: Comm, attempt: Callable[[], _Value]) -> _Value:
    """`attempt()`, which must not wait for other ranks; `torch.OutOfMemoryError` on all ranks where one runs out.

    So ranks stay in step: either all go on, or all try again with less.
    """
    result: list[_Value] = []
    reason = None
    try:
        result.append(attempt())
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
    short = [why for why in comm.all_gather_object(reason) if why is not None]
    if short:
        result.clear()
        raise torch.OutOfMemoryError(short[0])
    return result[0]


def in_turn(comm: Comm, attempt: Callable[[], _Value]) -> _Value:
    """`attempt()`, in which ranks wait for each other; where one runs out of memory it cannot be repeated."""
    try:
        return attempt()
    except RuntimeError as error:
        if comm.size == 1 or not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise ResourceError(
            f"out of memory ({reason}) while ranks wait for each other, in ordered sums: use a smaller --micro-batch "
            "or --gram-budget; the run goes on from its last block"
        ) from error

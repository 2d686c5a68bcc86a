"""Communication between the ranks of a run; one process is a group of size 1 whose operations do nothing.

Every rank runs the same loop over blocks. Each has sequences of its own, so its Grams are partial sums, and each
quantizes matrices of its own, so the codes are exchanged. The loop does not branch on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from sarqc.errors import ResourceError, opening_line, out_of_memory

_Value = TypeVar("_Value")
_Own = TypeVar("_Own")


class Comm:
    """Ranks 0 .. size - 1, here those of one process. All call the same methods in the same order, except
    `recv_previous` and `send_next`.

    ordered: sums are made in the order of one process and keep its bits: each rank continues from the sums of the rank
    before. Otherwise all ranks sum at once and their sums are added.
    """

    rank, size, ordered = 0, 1, False

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks; all ranks get the same bits."""

    def recv_previous(self, tensors: Sequence[Tensor]) -> None:
        """Fill tensors with those of the previous rank; the first rank keeps its own."""

    def send_next(self, tensors: Sequence[Tensor]) -> None:
        """Send tensors to the next rank; the last rank sends nothing."""

    def broadcast(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Fill tensors with those of rank `owner`; shapes and dtypes are the same on all ranks."""

    def all_gather_object(self, value: _Value) -> list[_Value]:
        """A small value of each rank, on all ranks; tensors in it are on the CPU."""
        return [value]

    def gather_rows(self, rows: Iterator[Tensor], places: Sequence[Tensor]) -> Iterator[Tensor]:
        """On rank 0 the rows [1, ...] of all ranks in the order of their indices; on other ranks nothing.

        rows: of this rank. places: indices of the rows of each rank, ascending. All ranks iterate to the end. A yielded
        row may be overwritten by the next.
        """
        return rows


SINGLE_PROCESS = Comm()


def exchange(comm: Comm, attempt: Callable[[], tuple[_Own, _Value]]) -> tuple[_Own, list[_Value]]:
    """What `attempt()` has for this rank, and the small values that it has for all, of every rank, in one message.

    It must not wait for other ranks. Raises `torch.OutOfMemoryError` on all ranks where one runs out: so ranks stay in
    step, and all continue or all retry with less.
    """
    own: list[_Own] = []
    small: _Value | None = None
    reason = None
    try:
        mine, small = attempt()
        own.append(mine)
        del mine
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        reason = opening_line(error)
    gathered = comm.all_gather_object((reason, small))
    if short := [why for why, _ in gathered if why is not None]:
        own.clear()
        raise torch.OutOfMemoryError(short[0])
    return own[0], [cast(_Value, value) for _, value in gathered]


def synchronize_oom(comm: Comm, attempt: Callable[[], _Own]) -> _Own:
    """`attempt()`, with nothing for other ranks but whether one ran out of memory, as in `exchange`."""
    return exchange(comm, lambda: (attempt(), None))[0]


def gather(comm: Comm, attempt: Callable[[], _Value]) -> list[_Value]:
    """The small values of `attempt()` of every rank, on all ranks, as in `exchange`."""
    return exchange(comm, lambda: (None, attempt()))[1]


def one_rank_at_a_time(comm: Comm, attempt: Callable[[], _Value]) -> _Value:
    """`attempt()`, in which ranks wait for each other; it cannot be repeated where one runs out of memory."""
    try:
        return attempt()
    except RuntimeError as error:
        if comm.size == 1 or not out_of_memory(error):
            raise
        reason = opening_line(error)
        raise ResourceError(
            f"out of memory ({reason}) while ranks wait for each other, in ordered sums: use a smaller "
            "--micro-batch or --gram-budget; rerun the command to resume from the last block"
        ) from error

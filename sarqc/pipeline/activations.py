"""Hidden states of all windows, waiting on the host between two blocks.

They are made once from the embeddings, or handed in by whoever continues a run; every block reads them and, once its
weights are quantized, moves them on in place. Where sites are to correct the error of earlier layers, those of the
original model are kept beside them and go through every block before it is quantized. A `Room` says where they are
kept; they are only ever looked at a few windows at a time, because they may be too many for memory.

Where hidden states are kept between two blocks, as the loop over blocks sees it.

This room knows no files. Whoever runs the loop may hand in an object that puts states elsewhere than into memory; what
is computed with them is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from sarqc.checkpoint.state import ChunkedTensor
from sarqc.errors import NumericError
from sarqc.method.gram import lost_rows
from sarqc.model.lazy_model import Skeleton
from sarqc.model.source import TensorSource
from sarqc.pipeline.comm import SINGLE_PROCESS, Comm
from sarqc.pipeline.work_split import Batches, partition_batches, positions, renumbered


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


TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 8192}
"""Tokens of a micro-batch: few enough for a CPU's caches, enough to fill a GPU."""
PROBE_TOKENS = 8
"""Tokens of the forward in which sites are found."""


@dataclass
class States:
    """hidden: [S, L, H] on the host. batches: the windows of each micro-batch and the fold they belong to. original:
    the same of the unquantized model, or None. wanted: what its stream was at the residual write of the block that
    it was last moved through; where that is the end of the block, this is `original`. passed: windows that are
    through the block that moves them on right now. places: which windows of the text each rank of the group has;
    here are those of one of them. room: makes these tensors.
    """

    hidden: Tensor
    batches: Batches
    folds: int
    original: Tensor | None = None
    wanted: Tensor | None = None
    passed: int = 0
    places: Sequence[Tensor] = ()
    room: Room = MEMORY

    def whole(self, comm: Comm) -> ChunkedTensor:
        """Hidden states of all windows of the text, gathered on rank 0 as they are asked for, window by window; every
        rank has to ask for them, and on the others there are none."""
        shape = (sum(map(len, self.places)), *self.hidden.shape[1:])
        return ChunkedTensor(shape, self.hidden.dtype, lambda: comm.gather_rows(self._leaving(), self.places))

    def _leaving(self) -> Iterator[Tensor]:
        for window in self.hidden.split(1):
            yield window
            self.room.leave(window)

    @property
    def micro_batch(self) -> int:
        """Windows in the largest micro-batch."""
        return max(int(windows.stop - windows.start) for windows, _ in self.batches)

    def probe(self) -> Tensor:
        """The first tokens [1, PROBE_TOKENS, H] of the first window."""
        return self.hidden[:1, :PROBE_TOKENS]

    def of_fold(self, fold: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each micro-batch of a fold: its hidden states, and what is wanted at the residual write of the block, if
        known.
        """
        for windows, of in self.batches:
            if of == fold:
                own, other = self.hidden[windows], None if self.wanted is None else self.wanted[windows]
                yield own, other
                for part in (own,) if other is None else (own, other):
                    self.room.leave(part)

    def lost_rows(self) -> int:
        """How many rows of hidden [H] hold NaN or Inf."""
        return sum(lost_rows(window) for window in self._leaving())

    def move_on(self, call: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Replace hidden by call(hidden), a micro-batch at a time; called again after a failure, it goes on there."""
        for windows in self._left():
            self._put(self.hidden[windows], call(self.hidden[windows].to(device)))

    def move_original_on(self, call: Callable[[Tensor], tuple[Tensor, Tensor]], device: torch.device) -> None:
        """The same for those of the unquantized model, if they are kept: call(original) is what leaves the block, and
        the reference at its residual write, the very same tensor where that is the end of the block."""
        if self.original is None:
            return
        for windows in self._left():
            leaving, stream = call(self.original[windows].to(device))
            if stream is leaving:
                self.wanted = self.original
            elif self.wanted is None or self.wanted is self.original:
                pinned = self.original.is_pinned()
                self.wanted = self.room.empty(self.original.shape, self.original.dtype, pinned=pinned)
            if self.wanted is not self.original:
                self._put(self.wanted[windows], stream)
            self._put(self.original[windows], leaving)

    def _left(self) -> Iterator[slice]:
        """Windows of the micro-batches that are to be moved on; after a failure those that have not been."""
        for windows, _ in self.batches:
            if windows.start >= self.passed:
                yield windows
                self.passed = windows.stop
        self.passed = 0

    def _put(self, place: Tensor, states: Tensor) -> None:
        place.copy_(states)
        self.room.leave(place)

    def halve(self) -> None:
        """Cut every micro-batch of more than one window in two."""
        cut = []
        for windows, fold in self.batches:
            middle = (windows.start + windows.stop + 1) // 2
            cut += [(part, fold) for part in (slice(windows.start, middle), slice(middle, windows.stop))]
        self.batches = [(part, fold) for part, fold in cut if part.stop > part.start]

    def prepare(self, skeleton: Skeleton) -> None:
        """Record how blocks are called for all shapes that occur; needs the outer weights."""
        for size in sorted({windows.stop - windows.start for windows, _ in self.batches}, reverse=True):
            skeleton.prepare(size, self.hidden.shape[1])
        skeleton.prepare(1, min(PROBE_TOKENS, self.hidden.shape[1]))


def windows_at_once(device: torch.device, length: int) -> int:
    """Windows of so many tokens that go through a block at once where nobody says otherwise."""
    return max(1, TOKENS_AT_ONCE[device.type] // length)


def cut(count: int, micro_batch: int, folds: int, first: int = 0) -> Batches:
    """Micro-batches of the windows from `first` to `count`, none of them across two folds; folds are stretches of
    nearly equal length."""
    edges = [first + fold * (count - first) // folds for fold in range(folds + 1)]
    return [
        (slice(start, min(start + micro_batch, stop)), fold)
        for fold, (begin, stop) in enumerate(pairwise(edges))
        for start in range(begin, stop, micro_batch)
    ]


def enter(
    skeleton: Skeleton,
    source: TensorSource,
    tokens: Tensor,
    batches: Batches,
    folds: int,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    hidden: ChunkedTensor | None = None,
    original: bool = False,
    comm: Comm = SINGLE_PROCESS,
    room: Room = MEMORY,
) -> States:
    """Hidden states of this rank's windows of tokens int64 [S, L] before block 0, or its part of `hidden` as it is,
    with all shapes prepared. `ArgumentError` where there are too few micro-batches for all ranks.

    original: keep those of the unquantized model too; they begin before block 0 in any case. Raises `NumericError`
    where the embeddings are not finite.
    """
    dealt = partition_batches(batches, folds, comm.size)
    places = [positions(part) for part in dealt]
    own = places[comm.rank]
    if comm.size > 1:
        batches, tokens = renumbered(dealt[comm.rank]), tokens[own]
    skeleton.load_outer(source, device, dtype)
    pinned = device.type == "cuda"
    kept = [] if hidden is None else [_own(hidden, own, room, pinned)]
    kept += embed(skeleton, tokens, batches, 1 + original - len(kept), room=room, pinned=pinned)
    states = States(kept[0], batches, folds, kept[1] if original else None, places=places, room=room)
    if hidden is None and states.lost_rows():
        raise NumericError("the embeddings of the calibration tokens hold NaN or Inf; repair the checkpoint")
    states.prepare(skeleton)
    skeleton.unload_outer()
    return states


def embed(
    skeleton: Skeleton, tokens: Tensor, batches: Batches, copies: int = 1, *, room: Room = MEMORY, pinned: bool = False
) -> list[Tensor]:
    """So many copies of the hidden states [S, L, H] before block 0, of tokens int64 [S, L]; needs `load_outer`."""
    kept: list[Tensor] = []
    for windows, _ in batches if copies else ():
        entering = skeleton.embed(tokens[windows])
        if not kept:
            shape = (len(tokens), *entering.shape[1:])
            kept = [room.empty(shape, entering.dtype, pinned=pinned) for _ in range(copies)]
        for states in kept:
            states[windows].copy_(entering)
            room.leave(states[windows])
    return kept


def _own(hidden: ChunkedTensor, place: Tensor, room: Room, pinned: bool) -> Tensor:
    """The windows of hidden that have these numbers, in a tensor of their own."""
    kept = room.empty((len(place), *hidden.shape[1:]), hidden.dtype, pinned=pinned)
    at = {number: position for position, number in enumerate(place.tolist())}
    for number, window in enumerate(hidden.rows()):
        if number in at:
            kept[at[number]].copy_(window)
            room.leave(kept[at[number]])
    return kept

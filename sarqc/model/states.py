"""Hidden states of all windows, waiting on the host between two blocks.

They are made once from the embeddings, or handed in by whoever continues a run; every block reads them and, once its
weights are quantized, moves them on in place. Where sites are to make up for earlier errors, those of the original
model are kept beside them and go through every block before it is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sarqc.errors import NumericError
from sarqc.model.group import ALONE, Group
from sarqc.model.sharing import deal, positions, renumbered
from sarqc.model.skeleton import Skeleton
from sarqc.model.source import TensorSource

GLANCE = 8
"""Tokens of the forward in which sites are found."""


@dataclass
class States:
    """hidden: [S, L, H] on the host. batches: the windows of each micro-batch and the fold they belong to.
    original: the same of the unquantized model, or None. passed: windows that are through the block that moves them on
    right now. places: which windows of the text each rank of the group has; here are those of one of them."""

    hidden: Tensor
    batches: list[tuple[slice, int]]
    folds: int
    original: Tensor | None = None
    passed: int = 0
    places: Sequence[Tensor] = ()

    def whole(self, group: Group) -> Tensor | None:
        """Hidden states of all windows of the text on rank 0: in memory of their own, where there are other ranks."""
        parts = group.collect(self.hidden, [len(place) for place in self.places])
        if len(parts) <= 1:
            return parts[0] if parts else None
        gathered = torch.empty(sum(map(len, parts)), *self.hidden.shape[1:], dtype=self.hidden.dtype)
        for place, part in zip(self.places, parts):
            gathered[place] = part
        return gathered

    @property
    def micro_batch(self) -> int:
        """Windows in the largest micro-batch."""
        return max(int(windows.stop - windows.start) for windows, _ in self.batches)

    def move_on(self, call: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Replace hidden by call(hidden), a micro-batch at a time; called again after a failure, it goes on there."""
        self._move(self.hidden, call, device)

    def move_original_on(self, call: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """The same for those of the unquantized model, if they are kept."""
        if self.original is not None:
            self._move(self.original, call, device)

    def _move(self, states: Tensor, call: Callable[[Tensor], Tensor], device: torch.device) -> None:
        for windows, _ in self.batches:
            if windows.start >= self.passed:
                states[windows].copy_(call(states[windows].to(device)))
                self.passed = windows.stop
        self.passed = 0

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
        skeleton.prepare(1, min(GLANCE, self.hidden.shape[1]))


def cut(count: int, micro_batch: int, folds: int) -> list[tuple[slice, int]]:
    """Micro-batches of `count` windows, none of them across two folds; folds are stretches of nearly equal length."""
    edges = [fold * count // folds for fold in range(folds + 1)]
    return [
        (slice(start, min(start + micro_batch, stop)), fold)
        for fold, (first, stop) in enumerate(pairwise(edges))
        for start in range(first, stop, micro_batch)
    ]


def enter(
    skeleton: Skeleton,
    source: TensorSource,
    tokens: Tensor,
    batches: list[tuple[slice, int]],
    folds: int,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    hidden: Tensor | None = None,
    original: bool = False,
    group: Group = ALONE,
) -> States:
    """Hidden states of this rank's windows of tokens int64 [S, L] before block 0, or of `hidden` as it is, with all
    shapes prepared. `ArgumentError` where there are too few micro-batches for all ranks.

    original: keep those of the unquantized model too; they begin before block 0 in any case. Raises `NumericError`
    where the embeddings are not finite.
    """
    dealt = deal(batches, folds, group.size)
    places = [positions(part) for part in dealt]
    if group.size > 1:
        batches, own = renumbered(dealt[group.rank]), places[group.rank]
        tokens, hidden = tokens[own], None if hidden is None else hidden[own]
    skeleton.load_outer(source, device, dtype)
    embedded = _embedded(skeleton, tokens, batches, device) if hidden is None or original else None
    if hidden is None:
        assert embedded is not None
        kept, beside = embedded, embedded.clone() if original else None
    else:
        kept, beside = hidden.pin_memory() if device.type == "cuda" else hidden, embedded
    states = States(kept, batches, folds, beside, places=places)
    states.prepare(skeleton)
    skeleton.unload_outer()
    return states


def _embedded(skeleton: Skeleton, tokens: Tensor, batches: list[tuple[slice, int]], device: torch.device) -> Tensor:
    kept = torch.empty(0)
    for windows, _ in batches:
        entering = skeleton.embed(tokens[windows])
        if not len(kept):
            shape = (len(tokens), *entering.shape[1:])
            kept = torch.empty(shape, dtype=entering.dtype, pin_memory=device.type == "cuda")
        kept[windows].copy_(entering)
    if not bool(torch.isfinite(kept).all()):
        raise NumericError("the embeddings of the calibration tokens hold NaN or Inf; repair the checkpoint")
    return kept

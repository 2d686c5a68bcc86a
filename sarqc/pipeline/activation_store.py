"""Where activations of suspended micro-batches are kept: in host memory up to a budget, and in a file beyond it."""

from __future__ import annotations

import ctypes
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import torch
from torch import Tensor, UntypedStorage

from sarqc.errors import ResourceError

PREFIX = "activations-"
"""Of the name that the file has for an instant."""
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Ticket:
    """What a store gives for bytes that it keeps. kept: in memory, or None where they are in the file at `start`."""

    size: int
    start: int = 0
    kept: Tensor | None = None


class Store(Protocol):
    """Keeps bytes of storages, of any device."""

    def put(self, storage: UntypedStorage) -> Ticket:
        """Keep a copy of its bytes."""

    def take(self, ticket: Ticket, storage: UntypedStorage) -> None:
        """Write the bytes back into a storage of their size, and keep them no longer."""

    def drop(self, ticket: Ticket) -> None:
        """Keep them no longer."""


class FileStore:
    """An unnamed file in a folder, made when it is first needed; it is gone with the process, however that ends. Where
    the folder is not there (as on another machine than the one that leads a run), in the first one above it that is.

    Freed ranges are used again, so the file is no larger than what was kept at once (and what is between).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._end = 0
        self._free: list[tuple[int, int]] = []  # (start, size), by start, never touching

    def put(self, storage: UntypedStorage) -> Ticket:
        """Write to the file; `ResourceError` where the disk is full."""
        ticket = Ticket(storage.nbytes(), self._reserve(storage.nbytes()))
        at = ticket.start
        for part in _bytes(storage).split(_CHUNK):
            view = _view(part.cpu())
            while len(view):
                try:
                    written = os.pwrite(self._open(), view, at)
                except OSError as error:
                    raise ResourceError(
                        f"{self._folder} takes no more activations ({error.strerror}): free some space there, or use "
                        "fewer --num-samples or a larger --activation-budget"
                    ) from error
                at, view = at + written, view[written:]
        return ticket

    def take(self, ticket: Ticket, storage: UntypedStorage) -> None:
        """Read from the file."""
        at = ticket.start
        for part in _bytes(storage).split(_CHUNK):
            there = part if part.device.type == "cpu" else torch.empty(part.shape, dtype=torch.uint8)
            view = _view(there)
            while len(view):
                read = os.preadv(self._open(), [view], at)
                if read == 0:
                    raise ResourceError(f"activations in a file in {self._folder} are gone: the file was cut short")
                at, view = at + read, view[read:]
            if there is not part:
                part.copy_(there)
        self.drop(ticket)

    def drop(self, ticket: Ticket) -> None:
        """Free the range."""
        ranges = sorted([*self._free, (ticket.start, ticket.size)])
        self._free = []
        for start, size in ranges:
            if self._free and sum(self._free[-1]) == start:
                self._free[-1] = (self._free[-1][0], self._free[-1][1] + size)
            else:
                self._free.append((start, size))

    def _reserve(self, size: int) -> int:
        for at, (start, free) in enumerate(self._free):
            if free >= size:
                self._free[at : at + 1] = [(start + size, free - size)] if free > size else []
                return start
        start, self._end = self._end, self._end + size
        return start

    def _open(self) -> int:
        if self._file is None:
            resolved = self._folder.resolve()
            place = next(one for one in (resolved, *resolved.parents) if one.is_dir())
            try:
                self._file = tempfile.TemporaryFile(prefix=PREFIX, dir=place)  # noqa: SIM115 (open as long as the store)
            except OSError as error:
                raise ResourceError(f"{place} takes no file for activations: {error.strerror}") from error
        return self._file.fileno()


class HostStore:
    """Copies in host memory up to a budget, pinned where the storage is on a GPU; beyond it in a file. Of use where the
    storages are on another device."""

    def __init__(self, budget: int, beyond: FileStore) -> None:
        self._left = budget
        self._beyond = beyond

    def put(self, storage: UntypedStorage) -> Ticket:
        """A copy in host memory, or in the file where it has no room."""
        source = _bytes(storage)
        if source.nbytes > self._left:
            return self._beyond.put(storage)
        kept = torch.empty(source.shape, dtype=torch.uint8, pin_memory=source.is_cuda).copy_(source)
        self._left -= source.nbytes
        return Ticket(source.nbytes, kept=kept)

    def take(self, ticket: Ticket, storage: UntypedStorage) -> None:
        """Copy back."""
        if ticket.kept is None:
            self._beyond.take(ticket, storage)
        else:
            _bytes(storage).copy_(ticket.kept)
            self._left += ticket.size

    def drop(self, ticket: Ticket) -> None:
        """The ticket holds the memory."""
        if ticket.kept is None:
            self._beyond.drop(ticket)
        else:
            self._left += ticket.size


def _view(there: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU. `Tensor.numpy` would forbid its storage to be resized."""
    return memoryview((ctypes.c_char * there.numel()).from_address(there.data_ptr())).cast("B")


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

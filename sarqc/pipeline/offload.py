"""Tensors that live in a file while they are needed: as large as the disk, and gone with the process.

The file has no name from the moment it is open, so neither a kill nor a power cut leaves it behind. Its blocks are
allocated before it is mapped: on a full disk that fails with a message, where writing through a map would end the
process with a bus error. Pages that were touched count as memory of the process, so whoever is done with a part gives
its pages back; what is in them stays in the file, as far as the system wants to in its cache.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sarqc.errors import ResourceError

PREFIX = "states-"
"""Of the name that a file may have for an instant, where the system knows no files without one."""


class Scratch:
    """Makes tensors in memory for as long as `budget` bytes last, and in files in or above `folder` after that. A file
    goes with the last view of its tensor.

    A folder that is not there yet, as on another machine than the one that leads a run, is not made: the files lie in
    the first folder above it that is.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self._folder = folder
        self._left = budget
        self._maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by address; each is its tensor's

    def empty(self, shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> Tensor:
        """An uninitialised tensor; `ResourceError` where the disk has no room for it. pinned: if it is in memory."""
        size = prod(shape) * dtype.itemsize
        if size <= self._left:
            self._left -= size
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=pinned)
        mapped = self._mapped(size)
        flat = torch.frombuffer(mapped, dtype=torch.uint8)
        self._maps[flat.data_ptr()] = mapped
        return flat.view(dtype).view(tuple(shape))

    def leave(self, part: Tensor) -> None:
        """Give the pages of `part` back, where it is of a file; they are read again when it is next looked at."""
        for begin, mapped in self._maps.items():
            first = part.data_ptr() - begin
            if 0 <= first < len(mapped):
                start = first - first % mmap.PAGESIZE
                mapped.madvise(mmap.MADV_DONTNEED, start, first - start + part.numel() * part.element_size())

    def _mapped(self, size: int) -> mmap.mmap:
        resolved = self._folder.resolve()
        place = next(one for one in (resolved, *resolved.parents) if one.is_dir())
        try:
            with tempfile.TemporaryFile(dir=place, prefix=PREFIX, buffering=0) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                return mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise ResourceError(
                f"{place} cannot hold {size / 1e9:.3g} GB of hidden states ({error.strerror or error}): make room, use "
                "another --work-dir, or keep more of them in memory with --activation-budget"
            ) from error

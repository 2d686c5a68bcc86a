"""Tensors and a JSON record in one safetensors file that is whole or absent, and knows when it was changed.

For what a run saves on its way. The file is written under another name, forced to disk and renamed, so that neither a
kill nor a power cut leaves half of it under its own name; sums of the record and of every tensor stand in its header,
so that what rots later is refused instead of believed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sarqc.checkpoint.files import parse_json, write_all
from sarqc.checkpoint.headers import Entry, bytes_of, make_header
from sarqc.checkpoint.shards import Shard
from sarqc.errors import CheckpointError, ResourceError, SarqcError

_RECORD, _SUMS, _SEAL = "record", "sums", "seal"
PARTIAL = ".partial"
"""Ending of a file that is being written; one that is found was left by a run that was killed."""


@dataclass(frozen=True)
class ChunkedTensor:
    """shape: of the whole, [S, ...]. each(): its pieces [n, ...] on the CPU in order, n >= 1; it may be asked again,
    and a piece may be overwritten once the next one is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    each: Callable[[], Iterator[Tensor]]

    @classmethod
    def of(cls, whole: Tensor) -> ChunkedTensor:
        """A tensor that is in memory, as its one piece."""
        return cls(tuple(whole.shape), whole.dtype, lambda: iter([whole]))

    def rows(self) -> Iterator[Tensor]:
        """Its S rows [...] one by one."""
        for part in self.each():
            yield from part


class State:
    """An open file of `write_state`. record: the JSON object that was given; tensors are checked as they are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shard = Shard(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        record, sums = metadata.get(_RECORD, ""), metadata.get(_SUMS, "")
        if _sha256((record + sums).encode()) != metadata.get(_SEAL):
            raise CheckpointError(f"{path} is damaged: its record does not match its sum")
        self.record: dict[str, Any] = parse_json(record.encode(), f"the record in {path}")
        self._sums: dict[str, str] = parse_json(sums.encode(), f"the sums in {path}")
        if self._sums.keys() != self._shard.entries.keys():
            raise CheckpointError(f"{path} is damaged: it does not hold the tensors it was written with")

    def names(self) -> list[str]:
        """Names of its tensors."""
        return list(self._sums)

    def load(self, name: str) -> Tensor:
        """Tensor `name` on the CPU; `CheckpointError` where it is not what was written."""
        tensor = self._shard.load(name)
        digest = _digest(tensor.dtype, tensor.shape)
        digest.update(bytes_of(tensor))
        self._compare(name, digest.hexdigest())
        return tensor

    def parts(self, name: str) -> ChunkedTensor:
        """Tensor `name` piece by piece; behind the last one, `CheckpointError` where it is not what was written."""
        entry = self._shard.entries[name]

        def each() -> Iterator[Tensor]:
            digest = _digest(entry.dtype, entry.shape)
            for part in self._shard.parts(name):
                digest.update(bytes_of(part))
                yield part
            self._compare(name, digest.hexdigest())

        return ChunkedTensor(entry.shape, entry.dtype, each)

    def check(self) -> None:
        """Read everything once, and keep nothing of it."""
        for name in self._sums:
            for _ in self.parts(name).each():
                pass

    def _compare(self, name: str, found: str) -> None:
        if found != self._sums[name]:
            raise CheckpointError(f"{self.path} is damaged: tensor {name!r} does not match its sum")

    def close(self) -> None:
        """Close the file."""
        self._shard.close()


@contextmanager
def open_state(path: Path) -> Iterator[State]:
    """The file of `write_state` at `path`; `CheckpointError` where it is missing or was changed."""
    state = State(path)
    try:
        yield state
    finally:
        state.close()


def write_state(path: Path, tensors: Mapping[str, Tensor | ChunkedTensor], record: Mapping[str, Any]) -> None:
    """Write `tensors` (any device and strides) and `record` (JSON values) to `path`, replacing what is there.

    Each tensor is gone through once, piece by piece where it comes in pieces. On disk when this returns.
    `ResourceError` where the disk fails or is full; what was at `path` before is then still there.
    """
    whole = {
        name: given if isinstance(given, ChunkedTensor) else ChunkedTensor.of(given) for name, given in tensors.items()
    }
    entries = {name: Entry(one.dtype, one.shape, 0) for name, one in whole.items()}
    text = json.dumps(record, sort_keys=True, allow_nan=False)

    def header(sums: Mapping[str, str]) -> tuple[bytes, list[str]]:
        said = json.dumps(sums, sort_keys=True)
        return make_header(entries, {_RECORD: text, _SUMS: said, _SEAL: _sha256((text + said).encode())})

    # Sums stand in front of what they are of and are known behind it: they are filled in last, and are of one length.
    blank, order = header(dict.fromkeys(whole, "0" * 64))
    sums = {}
    with durable(path) as partial, partial.open("wb", buffering=0) as file:
        write_all(file, memoryview(blank))
        for name in order:
            digest = _digest(whole[name].dtype, whole[name].shape)
            for part in whole[name].each():
                view = bytes_of(part)
                digest.update(view)
                write_all(file, view)
            sums[name] = digest.hexdigest()
        file.seek(0)
        write_all(file, memoryview(header(sums)[0]))
        os.fsync(file.fileno())  # some file systems say only now that the disk is full


@contextmanager
def durable(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the name `path` when the block ends well and is removed when it does not."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, has to outlive a power cut
        finally:
            os.close(folder)
    except (OSError, SarqcError) as error:  # of the disk, or of whoever hands the pieces on
        with suppress(OSError):  # the first error is the one to report
            partial.unlink(missing_ok=True)
        if isinstance(error, SarqcError):
            raise
        raise ResourceError(f"{path} cannot be written: {error.strerror or error}") from error


def _digest(dtype: torch.dtype, shape: Sequence[int]) -> Any:
    """sha256 of dtype and shape, to which the bytes are added."""
    return hashlib.sha256(f"{dtype}{list(shape)}".encode())


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()

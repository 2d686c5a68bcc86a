"""Tensors and a JSON record in one safetensors file that is whole or absent, and knows when it was changed.

For what a run saves on its way. The file is written under another name, forced to disk and renamed, so that neither a
kill nor a power cut leaves half of it under its own name; sums of the record and of every tensor stand in its header,
so that what rots later is refused instead of believed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sarqc.checkpoint.files import parse_json
from sarqc.checkpoint.headers import Entry, bytes_of, make_header
from sarqc.checkpoint.shards import Shard
from sarqc.errors import CheckpointError, ResourceError

_RECORD, _SUMS, _SEAL = "record", "sums", "seal"
PARTIAL = ".partial"
"""Ending of a file that is being written; one that is found was left by a run that was killed."""


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
        if _tensor_sum(tensor) != self._sums[name]:
            raise CheckpointError(f"{self.path} is damaged: tensor {name!r} does not match its sum")
        return tensor

    def check(self) -> None:
        """Read everything once."""
        for name in self._sums:
            self.load(name)

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


def write_state(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write `tensors` (any device and strides) and `record` (JSON values) to `path`, replacing what is there.

    On disk when this returns. `ResourceError` where the disk fails or is full; what was at `path` before is then still
    there.
    """
    entries = {name: Entry(tensor.dtype, tuple(tensor.shape), 0) for name, tensor in tensors.items()}
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    sums = json.dumps({name: _tensor_sum(tensor) for name, tensor in tensors.items()}, sort_keys=True)
    header, order = make_header(entries, {_RECORD: text, _SUMS: sums, _SEAL: _sha256((text + sums).encode())})
    with durable(path) as partial, partial.open("wb", buffering=0) as file:
        for view in (memoryview(header), *(bytes_of(tensors[name]) for name in order)):
            while view:  # one call takes 2 GB at most, and less where the disk is nearly full
                view = view[file.write(view) :]
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
    except OSError as error:
        with suppress(OSError):  # the first error is the one to report
            partial.unlink(missing_ok=True)
        raise ResourceError(f"{path} cannot be written: {error.strerror or error}") from error


def _tensor_sum(tensor: Tensor) -> str:
    """sha256 of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()

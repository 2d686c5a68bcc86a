"""Safetensors files that are whole or absent, and whose tensors are compared with their sums as they are read.

For what a run saves on its way. A file is written under another name, forced to disk and renamed, so that neither a
kill nor a power cut leaves half of it under its own name. `write_shard` writes a shard of a checkpoint and returns the
sum of every tensor, for the caller to keep. `write_state` keeps a JSON record and the sums in the file's own header.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sarqc.checkpoint.files import parse_json, read_json, sync, write_all
from sarqc.checkpoint.headers import Entry, bytes_of, dtype_name, make_header
from sarqc.checkpoint.manifest import Fingerprint, fingerprints
from sarqc.checkpoint.shards import Shard
from sarqc.contexts import Closing
from sarqc.errors import CheckpointError, ResourceError, SarqcError

_RECORD, _SUMS, _SEAL = "record", "sums", "seal"
PARTIAL = ".partial"
"""Ending of a file that is being written; one that is found was left by a run that was killed."""


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor that is passed on in chunks, where two copies would take too much memory.

    shape: of the whole, [S, ...]. each(): its chunks [n, ...] on the CPU in order, n >= 1; it may be called again, and
    a chunk may be overwritten once the next one is requested.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    each: Callable[[], Iterator[Tensor]]

    @classmethod
    def of(cls, whole: Tensor) -> ChunkedTensor:
        """A tensor in memory, as one chunk."""
        return cls(tuple(whole.shape), whole.dtype, lambda: iter([whole]))

    def rows(self) -> Iterator[Tensor]:
        """Its S rows [...] one by one."""
        for part in self.each():
            yield from part

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return Entry(self.dtype, self.shape, 0).nbytes


class SummedShard(Closing):
    """An open safetensors file. sums: of every tensor it was written with, which are compared as tensors are read.

    `CheckpointError` where the file is missing, or holds other tensors than `sums` lists.
    """

    def __init__(self, path: Path, sums: Mapping[str, Fingerprint]) -> None:
        self.path = path
        self._sums = sums
        self._shard = Shard(path)
        entries = self._shard.entries
        stored = {name: (dtype_name(entry.dtype), list(entry.shape)) for name, entry in entries.items()}
        if stored != {name: (one.dtype, list(one.shape)) for name, one in sums.items()}:
            self.close()
            raise CheckpointError(f"{path} is damaged: it does not hold the tensors it was written with")

    def names(self) -> list[str]:
        """Names of its tensors."""
        return list(self._sums)

    def load(self, name: str) -> Tensor:
        """Tensor `name` on the CPU; `CheckpointError` where it is not what was written."""
        tensor = self._shard.load(name)
        self._compare(name, hashlib.sha256(bytes_of(tensor)).hexdigest())
        return tensor

    def parts(self, name: str) -> ChunkedTensor:
        """Tensor `name` piece by piece; behind the last one, `CheckpointError` where it is not what was written."""
        entry = self._shard.entries[name]

        def each() -> Iterator[Tensor]:
            digest = hashlib.sha256()
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

    def _compare(self, name: str, actual: str) -> None:
        if actual != self._sums[name].sha256:
            raise CheckpointError(f"{self.path} is damaged: tensor {name!r} does not match its sum")

    def close(self) -> None:
        """Close the file."""
        self._shard.close()


def write_shard(path: Path, tensors: Mapping[str, Tensor | ChunkedTensor]) -> dict[str, Fingerprint]:
    """Write `tensors` (any device and strides) as a shard of a checkpoint to `path`; returns their sums.

    Each tensor is gone through once, piece by piece where it comes in pieces. On disk when this returns, and out of the
    system's cache, so that what is read later is what the disk holds. `ResourceError` where the disk fails or is full.
    """
    whole = _in_parts(tensors)
    header, order = make_header(_entries(whole))
    with durable(path) as partial, partial.open("wb", buffering=0) as file:
        write_all(file, memoryview(header))
        sums = _write_tensors(file, whole, order)
        os.fsync(file.fileno())  # some file systems say only now that the disk is full
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return sums


class State(SummedShard):
    """An open file of `write_state`. record: the JSON object that was given."""

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        record, sums = metadata.get(_RECORD, ""), metadata.get(_SUMS, "")
        if _sha256((record + sums).encode()) != metadata.get(_SEAL):
            raise CheckpointError(f"{path} is damaged: its record does not match its sum")
        self.record: dict[str, Any] = parse_json(record.encode(), f"the record in {path}")
        super().__init__(path, fingerprints(parse_json(sums.encode(), f"the sums in {path}"), path))


def write_state(path: Path, tensors: Mapping[str, Tensor | ChunkedTensor], record: Mapping[str, Any]) -> None:
    """As `write_shard`, with `record` (JSON values) and the sums in the file; what was at `path` is replaced."""
    whole = _in_parts(tensors)
    text = json.dumps(record, sort_keys=True, allow_nan=False)

    def header(sums: Mapping[str, Fingerprint]) -> tuple[bytes, list[str]]:
        listed = json.dumps({name: asdict(one) for name, one in sums.items()}, sort_keys=True)
        return make_header(_entries(whole), {_RECORD: text, _SUMS: listed, _SEAL: _sha256((text + listed).encode())})

    # Sums stand in front of what they are of and are known behind it: they are filled in last, and are of one length.
    blank, order = header({n: Fingerprint(dtype_name(w.dtype), list(w.shape), "0" * 64) for n, w in whole.items()})
    with durable(path) as partial, partial.open("wb", buffering=0) as file:
        write_all(file, memoryview(blank))
        sums = _write_tensors(file, whole, order)
        file.seek(0)
        write_all(file, memoryview(header(sums)[0]))
        os.fsync(file.fileno())


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON with its own sum; on disk when this returns."""
    with durable(path) as partial, partial.open("w", encoding="utf-8") as file:
        json.dump({**values, _SEAL: _seal(values)}, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote; `CheckpointError` where the file is missing or was changed."""
    values = read_json(path)
    if values.pop(_SEAL, None) != _seal(values):
        raise CheckpointError(f"{path} is damaged: it does not match its sum")
    return values


@contextmanager
def durable(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the name `path` when the block ends well and is removed when it does not."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        partial.replace(path)
        sync(path.parent)  # the new name, too, has to outlive a power cut
    except (OSError, SarqcError) as error:  # of the disk, or of the source of the chunks
        with suppress(OSError):  # the first error is the one to report
            partial.unlink(missing_ok=True)
        if isinstance(error, SarqcError):
            raise
        raise ResourceError(f"{path} cannot be written: {error.strerror or error}") from error


def _in_parts(tensors: Mapping[str, Tensor | ChunkedTensor]) -> dict[str, ChunkedTensor]:
    return {
        name: given if isinstance(given, ChunkedTensor) else ChunkedTensor.of(given) for name, given in tensors.items()
    }


def _entries(whole: Mapping[str, ChunkedTensor]) -> dict[str, Entry]:
    return {name: Entry(one.dtype, one.shape, 0) for name, one in whole.items()}


def _write_tensors(file: FileIO, whole: Mapping[str, ChunkedTensor], order: Sequence[str]) -> dict[str, Fingerprint]:
    sums = {}
    for name in order:
        digest = hashlib.sha256()
        for part in whole[name].each():
            view = bytes_of(part)
            digest.update(view)
            write_all(file, view)
        sums[name] = Fingerprint(dtype_name(whole[name].dtype), list(whole[name].shape), digest.hexdigest())
    return sums


def _seal(values: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(values, sort_keys=True).encode())


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()

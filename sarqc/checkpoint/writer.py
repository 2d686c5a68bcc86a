"""Tensors in, shards out: at most one tensor in memory, however large the shards.

A safetensors file begins with a header that lists all its tensors, so it cannot be written front to back while they
arrive. Their bytes go to a hidden spool file first; when it holds a shard's worth, the header is made and the bytes
are copied behind it. Shards get their names ("... of 00007") when the last one is done: a file under its final name
is complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from sarqc.checkpoint.files import write_all, write_json
from sarqc.checkpoint.headers import Entry, bytes_of, dtype_name, make_header
from sarqc.checkpoint.manifest import Fingerprint, fingerprint, write_manifest
from sarqc.checkpoint.shards import INDEX, SINGLE
from sarqc.errors import ArgumentError, CheckpointError

SHARD_BYTES = 5_000_000_000
_CHUNK = 16_000_000


class ShardWriter:
    """Writes `model.safetensors`, or shards with their index, and a manifest of all tensors into `folder`.

    A shard takes tensors while they fit `shard_bytes`; a larger tensor gets a shard of its own. As a context manager
    it closes at the end and, on an error, removes what it has written. The same tensors in the same order give the
    same bytes. `CheckpointError` where the folder holds a model already, and where the disk fails or is full.
    """

    def __init__(self, folder: Path | str, shard_bytes: int = SHARD_BYTES) -> None:
        if shard_bytes < 1:
            raise ArgumentError(f"shard_bytes = {shard_bytes} is out of range: use a number of bytes from 1 up")
        self.folder = Path(folder)
        self.shard_bytes = shard_bytes
        self._seen: dict[str, Fingerprint] = {}
        self._pending: dict[str, Entry] = {}  # `begin` is the place in the spool
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []  # finished ones under hidden names, with their tensors
        self._final: list[Path] = []
        self._spool: FileIO | None = None
        self._state: Literal["open", "closed", "aborted"] = "open"
        with self._writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if there := sorted(self.folder.glob("model*.safetensors*")):
                raise CheckpointError(f"{there[0]} is there already: write into an empty folder")

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes `tensor`, of any device and strides; its bytes are on disk when this returns."""
        if self._state != "open":
            raise CheckpointError(f"{self.folder}: tensor {name!r} came after the checkpoint was {self._state}")
        if name in self._seen or name == "__metadata__":
            raise CheckpointError(f"{self.folder}: tensor {name!r} was written already: names must differ")
        if tensor.is_meta or tensor.layout != torch.strided or dtype_name(tensor.dtype) is None:
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) "
                "has no bytes that a safetensors file can hold"
            )
        entry = Entry(tensor.dtype, tuple(tensor.shape), self._pending_bytes)
        if self._pending and self._pending_bytes + entry.nbytes > self.shard_bytes:
            self._finish_shard()
            entry = Entry(tensor.dtype, tuple(tensor.shape), 0)
        spool = self._open_spool()
        data = bytes_of(tensor)
        with self._writing(Path(spool.name)):
            write_all(spool, data)
        self._seen[name] = fingerprint(tensor, data)
        self._pending[name] = entry
        self._pending_bytes += entry.nbytes

    def close(self) -> tuple[Path, ...]:
        """Finishes the last shard, gives shards their names, writes index and manifest; returns the files written."""
        if self._state != "open":
            raise CheckpointError(f"{self.folder}: the checkpoint was {self._state} before")
        if self._pending:
            self._finish_shard()
        if not self._shards:
            raise CheckpointError(f"{self.folder}: no tensor was written, so there is no checkpoint")
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, (partial, names) in enumerate(self._shards, 1):
            final = self.folder / (SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors")
            with self._writing(final):
                partial.rename(final)
            self._final.append(final)
            weight_map.update(dict.fromkeys(names, final.name))
        if count > 1:
            index = self.folder / INDEX
            with self._writing(index):
                write_json(index, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map})
            self._final.append(index)
        with self._writing(self.folder):
            self._final.append(write_manifest(self.folder, self._seen))
        self._drop_spool()
        self._state = "closed"
        return tuple(self._final)

    def abort(self) -> None:
        """Removes everything this writer has written."""
        self._state = "aborted"
        with suppress(OSError):  # the error that brought us here is the one to report
            self._drop_spool()
            for path in [partial for partial, _ in self._shards] + self._final:
                path.unlink(missing_ok=True)

    def _finish_shard(self) -> None:
        """Turns the spool into a shard, still under a hidden name."""
        spool = self._open_spool()
        header, order = make_header(self._pending)
        partial = self.folder / f".model-{len(self._shards) + 1:05d}.partial"
        self._shards.append((partial, order))
        with self._writing(partial), partial.open("xb", buffering=0) as file:
            write_all(file, memoryview(header))
            for name in order:
                entry = self._pending[name]
                spool.seek(entry.begin)
                _copy(spool, file, entry.nbytes)
            os.fsync(file.fileno())  # some file systems say only now that the disk is full
            spool.seek(0)
            spool.truncate()
        self._total_bytes += self._pending_bytes
        self._pending = {}
        self._pending_bytes = 0

    def _open_spool(self) -> FileIO:
        if self._spool is None:
            path = self.folder / ".model.spool"
            with self._writing(path):
                self._spool = path.open("x+b", buffering=0)
        return self._spool

    def _drop_spool(self) -> None:
        if self._spool is not None:
            self._spool.close()
            Path(self._spool.name).unlink(missing_ok=True)
            self._spool = None

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Turns a failing disk into a `CheckpointError` that names `path`, with nothing half-written left behind."""
        try:
            yield
        except (OSError, CheckpointError) as error:
            self.abort()
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{path} cannot be written: {error.strerror or error}; what was written of this checkpoint is removed"
            ) from error

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self.abort()
        elif self._state != "closed":
            self.close()


def _copy(source: FileIO, target: FileIO, count: int) -> None:
    while count:
        chunk = source.read(min(count, _CHUNK))
        if not chunk:
            raise OSError("the spool file became shorter")
        write_all(target, memoryview(chunk))
        count -= len(chunk)

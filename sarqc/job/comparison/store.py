"""What a comparison keeps on disk: finished cells as JSON lines, and the statistics of the seed it works on.

A line is appended, flushed and synced when its cell is done, so that an interruption costs the cell in progress and
nothing else; a line that was cut off by one is dropped when the file is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sarqc.checkpoint.grams import load_statistics, save_statistics
from sarqc.errors import CheckpointError
from sarqc.method.statistics import Statistics
from sarqc.model.sites import Share

CELLS = "cells.jsonl"


def folder_fingerprint(folder: Path) -> str:
    """sha256 over config.json and every weight file of a checkpoint folder, names and contents."""
    total = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


class Cells:
    """Finished cells of a folder by identity. `identity(cell)` says which record is a cell's own."""

    def __init__(self, folder: Path, identity: Callable[[Any], str]) -> None:
        self.folder = folder
        self._identity = identity
        self._path = folder / CELLS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._records = self._read()
        except OSError as error:
            raise CheckpointError(f"output folder {folder} cannot be used: {error.strerror or error}") from error

    def __contains__(self, cell: object) -> bool:
        return self._identity(cell) in self._records

    def __getitem__(self, cell: object) -> dict[str, Any]:
        return self._records[self._identity(cell)]

    def add(self, cell: object, record: dict[str, Any]) -> None:
        """Keep a finished cell; it is on the disk when this returns."""
        key = self._identity(cell)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"cell": key} | record, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be written: {error.strerror or error}") from error
        self._records[key] = record

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self._path.exists():
            return {}
        raw = self._path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        found: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                found[record.pop("cell")] = record
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{self._path}, line {number}, is not a cell: delete that line") from error
        if len(whole) < len(raw):
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
        return found


class Grams:
    """The statistics of one seed on disk: a file for each block and calibration size, removed when they are used up."""

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        self.folder = folder
        self.sizes = list(sizes)
        self._written: dict[tuple[int, int], list[Path]] = {}

    def begin(self) -> None:
        """An empty folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._written.clear()
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be written: {error.strerror or error}") from error

    def save(self, block: int, size: int, shares: Mapping[Share, Statistics], *, blocks: int) -> None:
        """Write some shares of a block; `CheckpointError` after the first block where the disk has no room for all."""
        if block and not any(at for at, _ in self._written):
            self._check_room(blocks)
        own = self._written.setdefault((block, size), [])
        path = self.folder / f"block-{block:04d}-windows-{size}-{len(own)}.safetensors"
        save_statistics(path, {(share.site.name, share.first): kept for share, kept in shares.items()})
        own.append(path)

    def load(self, block: int, size: int, share: Share, device: torch.device, *, rest: bool) -> Statistics:
        """Statistics of a share, however they were cut when they were written; rest: with those of its others."""
        name, paths = share.site.name, self._written[block, size]
        found = load_statistics(paths, name, share.first, share.stop, device, rest=rest)
        if found is None:
            raise CheckpointError(f"{self.folder} holds no statistics of {name}: remove the folder and run again")
        return found

    def remove(self) -> None:
        """Give the disk back."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    def _check_room(self, blocks: int) -> None:
        used = sum(path.stat().st_size for paths in self._written.values() for path in paths)
        needed, free = used * (blocks - 1), shutil.disk_usage(self.folder).free
        if needed > free:
            self.remove()
            raise CheckpointError(
                f"{self.folder} needs {needed / 1e9:.1f} GB more for the statistics of {len(self.sizes)} calibration "
                f"sizes and has {free / 1e9:.1f} GB free: use another folder or fewer sizes at a time"
            )

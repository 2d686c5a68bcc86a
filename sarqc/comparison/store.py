"""What a comparison keeps on disk: finished cells as JSON lines.

A line is appended, flushed and synced when its cell is done, so that an interruption costs the cell in progress and
nothing else; a line that was cut off by one is dropped when the file is read again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from sarqc.errors import CheckpointError

CELLS = "cells.jsonl"


def folder_fingerprint(folder: Path) -> str:
    """sha256 over config.json and every weight file of a checkpoint folder, names and contents."""
    total = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


class Cells:
    """Finished cells of a folder by identity. `identity(cell)` says which record is a cell's own.

    It is asked once for each cell: that of a checkpoint reads all its weight files.
    """

    def __init__(self, folder: Path, identity: Callable[[Any], str]) -> None:
        self.folder = folder
        self._identity = functools.cache(identity)
        self._path = folder / CELLS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._records = self._read()
        except OSError as error:
            raise CheckpointError(f"output folder {folder} cannot be used: {error.strerror or error}") from error

    def __contains__(self, cell: Hashable) -> bool:
        return self._identity(cell) in self._records

    def __getitem__(self, cell: Hashable) -> dict[str, Any]:
        return self._records[self._identity(cell)]

    def add(self, cell: Hashable, record: dict[str, Any]) -> None:
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
        records: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                records[record.pop("cell")] = record
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{self._path}, line {number}, is not a cell: delete that line") from error
        if len(whole) < len(raw):
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
        return records

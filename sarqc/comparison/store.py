"""What a comparison keeps on disk: finished cells as JSON lines, and the statistics of the seed it works on.

A line is appended, flushed and synced when its cell is done, so that an interruption costs the cell in progress and
nothing else; a line that was cut off by one is dropped when the file is read again.

A file of statistics holds sites of one block, of each all experts or a range of them. Each sum is a tensor
"FOLD FIELD SITE", so that a reader takes what it needs, experts included, and no more; the number of the first expert
is "first SITE".
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sarqc.errors import CheckpointError
from sarqc.method.gram import Gram, Statistics, together
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


_FIELDS = tuple(field.name for field in fields(Gram))


def save_statistics(path: Path, sites: Mapping[tuple[str, int], Statistics]) -> None:
    """Write the statistics of sites by name and first expert; the file appears whole or not at all."""
    tensors = {
        f"{fold} {field} {name}": getattr(gram, field).cpu().contiguous()
        for (name, _), statistics in sites.items()
        for fold, gram in enumerate(statistics.folds)
        for field in _FIELDS
        if getattr(gram, field) is not None
    }
    tensors |= {f"first {name}": torch.tensor(first) for name, first in sites}
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        save_file(tensors, beside)
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def load_statistics(
    paths: Iterable[Path], name: str, first: int, stop: int, device: torch.device, *, rest: bool
) -> Statistics | None:
    """The statistics of experts first .. stop of a site, from all its files in their order; None where none holds it.

    rest: also the sums of what all other experts of the site saw, read one by one; none where these are all.
    """
    own: list[tuple[Gram, ...]] = []
    others: list[tuple[Gram, ...]] = []
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                begin, count = _stretch(file, name)
                start, end = (min(max(edge - begin, 0), count) for edge in (first, stop))
                if start < end:
                    own.append(_read(file, name, slice(start, end), device))
                for expert in (*range(start), *range(end, count)) if rest else ():
                    others.append(_read(file, name, slice(expert, expert + 1), device))
                    others = [tuple(map(together, zip(*others)))]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): delete it, it is made again") from error
    if not own:
        return None
    return Statistics(tuple(map(_side_by_side, zip(*own))), others[0] if others else ())


def _stretch(file: Any, name: str) -> tuple[int, int]:
    """The first expert of a site in a file, and how many there are; none where the file does not hold it."""
    key = f"0 {_FIELDS[0]} {name}"
    if key not in file.keys():  # noqa: SIM118  (the file is no mapping)
        return 0, 0
    return int(file.get_tensor(f"first {name}")), file.get_slice(key).get_shape()[0]


def _read(file: Any, name: str, experts: slice, device: torch.device) -> tuple[Gram, ...]:
    """Some experts of a stretch, of each fold."""
    stored = set(file.keys())
    folds = sum(key.split(" ", 2)[1:] == [_FIELDS[0], name] for key in stored)
    kept = [field for field in _FIELDS if f"0 {field} {name}" in stored]
    return tuple(
        Gram(**{field: file.get_slice(f"{fold} {field} {name}")[experts].to(device) for field in kept})
        for fold in range(folds)
    )


def _side_by_side(parts: Sequence[Gram]) -> Gram:
    """The experts of all parts, without `cross_gram`; the only part itself where there is one."""
    if len(parts) == 1:
        return parts[0]
    return Gram(*(torch.cat([getattr(part, field) for part in parts]) for field in _FIELDS[:3]))

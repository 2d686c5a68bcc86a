"""Statistics of a model's sites in files, so that they wait on disk and not in memory.

A file holds sites of one block, of each all experts or a stretch of them. Each sum is a tensor "FOLD FIELD SITE", so
that a reader takes what it needs, experts included, and no more; the number of the first expert is "first SITE".
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sarqc.errors import CheckpointError
from sarqc.method.statistics import Gram, Statistics, together

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
    """The experts of all parts; the only part itself where there is one. Of these nothing is asked (`Gram.wish`)."""
    if len(parts) == 1:
        return parts[0]
    return Gram(*(torch.cat([getattr(part, field) for part in parts]) for field in _FIELDS[:3]))

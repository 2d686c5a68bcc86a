"""Statistics of a model's sites in files, so that they wait on disk and not in memory.

A file holds the sites of one block. Each sum is a tensor called "FOLD FIELD SITE", so that a reader takes what it
needs, experts included, and no more.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sarqc.errors import CheckpointError
from sarqc.method.statistics import Gram, Statistics

_FIELDS = tuple(field.name for field in fields(Gram))


def save_statistics(path: Path, sites: Mapping[str, Statistics]) -> None:
    """Write the statistics of sites by name; the file appears whole or not at all."""
    tensors = {
        f"{fold} {field} {name}": getattr(gram, field).cpu().contiguous()
        for name, statistics in sites.items()
        for fold, gram in enumerate(statistics.folds)
        for field in _FIELDS
        if getattr(gram, field) is not None
    }
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        save_file(tensors, beside)
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def load_statistics(path: Path, name: str, first: int, stop: int, device: torch.device) -> Statistics | None:
    """The statistics of experts first .. stop of a site, or None where the file does not hold it."""
    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            folds = sum(key.split(" ", 2)[1:] == [_FIELDS[0], name] for key in stored)

            def read(fold: int, field: str) -> Tensor:
                part: Tensor = file.get_slice(f"{fold} {field} {name}")[first:stop]
                return part.to(device)

            kept = [field for field in _FIELDS if f"0 {field} {name}" in stored]
            grams = tuple(Gram(**{field: read(fold, field) for field in kept}) for fold in range(folds))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): delete it, it is made again") from error
    return Statistics(grams) if grams else None

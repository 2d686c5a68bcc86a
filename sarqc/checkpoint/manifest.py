"""What was written, tensor by tensor: the file that shows later whether a single bit has changed.

    {"algorithm": "sha256", "tensors": {NAME: {"dtype": "I32", "shape": [2, 3], "sha256": "..."}}, "version": 1}

The files beside the weights are added under "files" (`sarqc.checkpoint.file_sums`).

The sum is over the tensor's bytes in row-major order, so it does not depend on how tensors are spread over shards, and
copying a checkpoint into other shards keeps it. Nothing in it depends on time or place.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sarqc.checkpoint.files import file_in, read_json, write_json
from sarqc.checkpoint.headers import bytes_of, dtype_name
from sarqc.errors import CheckpointError

MANIFEST = "sarqc-manifest.json"
VERSION = 1
_ALGORITHM = "sha256"
_SUM = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Fingerprint:
    """One tensor: dtype as a safetensors header names it, shape, and sha256 of its bytes in hexadecimal."""

    dtype: str
    shape: list[int]
    sha256: str


def fingerprint(tensor: Tensor) -> Fingerprint:
    """The fingerprint of a tensor; its dtype must be one that a safetensors file holds."""
    return Fingerprint(dtype_name(tensor.dtype), list(tensor.shape), hashlib.sha256(bytes_of(tensor)).hexdigest())


def write_manifest(folder: Path, tensors: Mapping[str, Fingerprint]) -> Path:
    """Writes the manifest of `folder` and returns its path."""
    path = folder / MANIFEST
    content = {name: asdict(entry) for name, entry in tensors.items()}
    write_json(path, {"algorithm": _ALGORITHM, "tensors": content, "version": VERSION})
    return path


def read_manifest(folder: Path) -> dict[str, Fingerprint] | None:
    """Fingerprints by name; None where the folder has no manifest, `CheckpointError` for one that is damaged."""
    if (path := file_in(folder, MANIFEST)) is None:
        return None
    content = read_json(path)
    tensors = content.get("tensors")
    if content.get("version") != VERSION or content.get("algorithm") != _ALGORITHM or not isinstance(tensors, dict):
        raise CheckpointError(f"{path} is no manifest of version {VERSION} with {_ALGORITHM} sums: remove it")
    return fingerprints(tensors, path)


def fingerprints(tensors: Mapping[str, Any], path: Path) -> dict[str, Fingerprint]:
    """Fingerprints out of JSON values, which stand in the file `path`; `CheckpointError` for values that are none."""
    return {name: _fingerprint(path, name, fields) for name, fields in tensors.items()}


def _fingerprint(path: Path, name: str, fields: Any) -> Fingerprint:
    if isinstance(fields, dict) and fields.keys() == {"dtype", "shape", "sha256"}:
        entry = Fingerprint(**fields)
        if isinstance(entry.shape, list) and isinstance(entry.sha256, str) and _SUM.fullmatch(entry.sha256):
            return entry
    raise CheckpointError(f"{path} is damaged: it describes tensor {name!r} by {str(fields)[:80]!r}")

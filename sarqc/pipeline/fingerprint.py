"""What makes a run the run it is: whatever, changed, would give other bytes.

Two runs with one fingerprint may share a work folder. The model counts by its configuration, its headers and the sizes
of its files, so that terabytes need not be hashed; the text counts by its tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from sarqc.checkpoint.reader import Checkpoint
from sarqc.config import QUANTIZE
from sarqc.model.dataset import Windows
from sarqc.options import may_change, record
from sarqc.pipeline.plan import Plan
from sarqc.system import versions

MAY_CHANGE = ("output", *may_change(QUANTIZE), "ranks")
"""What a resumed run may change. The device, the micro-batch and the Gram budget change the order of sums, so the bytes
are the same only where they stay."""
_PACKAGES = ("sarqc", "torch", "transformers")


def fingerprint(plan: Plan, windows: Windows | None) -> dict[str, Any]:
    """The fingerprint of a run, as JSON values."""
    here = versions()
    return {
        "model": of_model(plan.checkpoint),
        "calibration": None if windows is None else windows.fingerprint,
        "quant": record(plan.quant),
        "method": record(plan.method),
        **record(plan.calibration),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "versions": {name: here[name] for name in _PACKAGES if name in here},
    }


def of_model(checkpoint: Checkpoint) -> dict[str, str]:
    """The fingerprint of a model's folder: sums over its config, its headers, and the sizes of its files."""
    tensors = [[name, str(checkpoint.dtype(name)), list(checkpoint.shape(name))] for name in checkpoint.names()]
    files = [[path.name, path.stat().st_size] for path in checkpoint.files]
    return {"config": _sum(checkpoint.config), "tensors": _sum(tensors), "files": _sum(files)}


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting in which two fingerprints differ, by the name a person knows it by, with both values."""
    flat, other = dict(_flat(old)), dict(_flat(new))
    for name in sorted(flat.keys() | other.keys(), key=lambda name: (name != "method", name)):  # it changes others
        if flat.get(name) != other.get(name):
            return name, flat.get(name), other.get(name)
    return None


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if name in ("quant", "method"):
            yield from value.items()
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value


def _sum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

"""What a run leaves behind beside the weights: report.json, every setting and every number of the run."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sarqc.checkpoint.files import file_in, read_json
from sarqc.errors import CheckpointError
from sarqc.method.solve import SolveReport
from sarqc.method.weight import QuantizedWeight
from sarqc.spec import QuantSpec, SolveSpec, to_json

REPORT = "report.json"
_PACKAGES = ("sarqc", "torch", "transformers", "safetensors", "triton")


@dataclass
class Size:
    """Bits and bytes of what is written, counted as it goes by."""

    quantized_weights: int = 0
    quantized_bytes: int = 0
    left_bytes: int = 0

    def quantized(self, weight: QuantizedWeight, packed: dict[str, Tensor]) -> None:
        """Count one quantized Linear and the tensors it became."""
        self.quantized_weights += weight.codes.numel()
        self.quantized_bytes += sum(map(_bytes, packed.values()))

    def left(self, tensor: Tensor) -> None:
        """Count one tensor that stays as it is."""
        self.left_bytes += _bytes(tensor)

    def record(self) -> dict[str, Any]:
        """Totals; bits_per_weight counts codes, scales and zeros over the quantized weights alone."""
        return {
            "bytes": self.quantized_bytes + self.left_bytes,
            "quantized_weights": self.quantized_weights,
            "quantized_bytes": self.quantized_bytes,
            "bits_per_weight": round(8 * self.quantized_bytes / max(self.quantized_weights, 1), 3),
        }


def build(
    *,
    model: str,
    quant: QuantSpec,
    solve: SolveSpec,
    calibration: dict[str, Any] | None,
    targets: dict[str, Any],
    sites: Sequence[SolveReport],
    stages: dict[str, float],
    size: dict[str, Any],
    device: str,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The report as JSON values."""
    return {
        "model": model,
        "quant": to_json(quant),
        "solve": to_json(solve),
        "calibration": calibration,
        "targets": targets,
        "size": size,
        "error": _mean([site.error for site in sites]),
        "rounding_error": _mean([site.rounding_error for site in sites]),
        "notes": list(notes),
        "fallbacks": {site.site: site.fallback for site in sites if site.fallback},
        "seconds": {stage: round(seconds, 3) for stage, seconds in stages.items()},
        "peak_memory_mib": peak_memory_mib(),
        "device": device,
        "versions": versions(),
        "sites": [asdict(site) | {"rows": list(site.rows)} for site in sites],
    }


def write(folder: Path, report: dict[str, Any]) -> None:
    """Write report.json into `folder`."""
    try:
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder / REPORT} cannot be written: {error.strerror or error}") from error


def read(folder: Path) -> dict[str, Any] | None:
    """The report in `folder`, or None where there is none that is whole."""
    try:
        path = file_in(folder, REPORT)
        return None if path is None else read_json(path)
    except CheckpointError:
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_memory_mib() -> dict[str, int]:
    """Highest memory so far of this process on the host, and of the tensors on each GPU that was used."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 * 1024 if sys.platform == "darwin" else 1024)
    found = {"host": int(peak)}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if used := torch.cuda.max_memory_allocated(index):
            found[f"cuda:{index}"] = used // 2**20
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

"""What a quantized checkpoint holds, read from its headers and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sarqc.checkpoint.reader import open_checkpoint
from sarqc.errors import CheckpointError
from sarqc.report import report as reports


def inspect(folder: str | Path) -> dict[str, Any]:
    """Format, tensors, bits per weight and the run's report, as JSON values; `CheckpointError` if not quantized."""
    checkpoint = open_checkpoint(Path(folder))
    if checkpoint.format is None:
        raise CheckpointError(f"{folder} is not quantized: inspect wants a folder that `sarqc quantize` wrote")
    stored = checkpoint.storage()
    if not stored.quantized_linears:
        raise CheckpointError(f"{folder} says it is quantized ({checkpoint.format.name}) but holds no quantized Linear")
    return {
        "folder": str(folder),
        "format": checkpoint.format.name,
        "quantization_config": checkpoint.config["quantization_config"],
        "tensors": stored.tensors,
        "shards": stored.shards,
        "bytes": stored.total_bytes,
        "quantized_linears": stored.quantized_linears,
        "bits_per_weight": stored.bits_per_weight,
        "report": reports.read(Path(folder)),
    }

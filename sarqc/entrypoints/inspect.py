"""What a quantized checkpoint holds, read from its headers and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sarqc.checkpoint.reader import open_checkpoint
from sarqc.errors import CheckpointError
from sarqc.model.hub import locate
from sarqc.report import report as reports


def inspect(checkpoint: str | Path) -> dict[str, Any]:
    """Format, tensors, bits per weight and the run's report, as JSON values; `CheckpointError` if not quantized.

    Args:
        checkpoint: Folder or hub id.
    """
    folder = locate(checkpoint)
    with open_checkpoint(folder) as opened:
        if opened.format is None:
            raise CheckpointError(f"{folder} is not quantized: give a checkpoint that `sarqc quantize` wrote")
        stored = opened.storage()
    if not stored.quantized_linears:
        raise CheckpointError(f"{folder} says it is quantized ({opened.format.name}) but holds no quantized Linear")
    return {
        "folder": str(folder),
        "format": opened.format.name,
        "quantization_config": opened.config["quantization_config"],
        "tensors": stored.tensors,
        "shards": stored.shards,
        "bytes": stored.total_bytes,
        "quantized_linears": stored.quantized_linears,
        "bits_per_weight": stored.bits_per_weight,
        "report": reports.read(folder),
    }

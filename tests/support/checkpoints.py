"""Weights of a checkpoint in a folder, as runs and conversions write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

from sarqc.checkpoint import assemble
from sarqc.checkpoint.state import ChunkedTensor


def write_weights(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int | None = None) -> None:
    """Write `tensors` with their manifest: one file, or shards of so many bytes with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    merged, shard = (shard_bytes, shard_bytes) if shard_bytes else (assemble.MERGE_BYTES, assemble.SHARD_BYTES)
    with patch.multiple(assemble, MERGE_BYTES=merged, SHARD_BYTES=shard):
        assemble.assemble(folder, [], {name: ChunkedTensor.of(tensor) for name, tensor in tensors.items()})

"""Checkpoints in folders: written as runs and conversions write them, checked, compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

from sarqc.checkpoint import assemble
from sarqc.checkpoint.differences import difference, other_names
from sarqc.checkpoint.reader import Checkpoint, Storage, open_checkpoint
from sarqc.checkpoint.state import ChunkedTensor
from sarqc.checkpoint.verify import problems
from sarqc.errors import CheckpointError


def write_weights(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int | None = None) -> None:
    """Write `tensors` with their manifest: one file, or shards of `shard_bytes` with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    merged, shard = (shard_bytes, shard_bytes) if shard_bytes else (assemble.MERGE_BYTES, assemble.SHARD_BYTES)
    with patch.multiple(assemble, MERGE_BYTES=merged, SHARD_BYTES=shard):
        assemble.assemble(folder, [], {name: ChunkedTensor.of(tensor) for name, tensor in tensors.items()})


def verify(folder: Path | str) -> Storage:
    """Read every tensor of `folder` and count them; `CheckpointError` naming the first that is not sound."""
    with open_checkpoint(folder) as checkpoint:
        for problem in problems(checkpoint):
            raise CheckpointError(problem)
        return checkpoint.storage()


def differences(checkpoint: Checkpoint, source: Checkpoint) -> Iterator[str]:
    """A line for each difference of two quantized checkpoints: names, codes, scales, zeros, other tensors."""
    if (other := other_names(checkpoint, source)) is not None:
        yield other
        return
    for name in source.names():
        yield from difference(checkpoint, source, name, checkpoint.stored(name))

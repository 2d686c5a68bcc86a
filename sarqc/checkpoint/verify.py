"""Reads a checkpoint back, every byte of it, the way a stranger would."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sarqc.checkpoint.files import read_json
from sarqc.checkpoint.reader import Checkpoint, Storage, open_checkpoint
from sarqc.checkpoint.shards import INDEX
from sarqc.errors import CheckpointError

_CHECKED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def verify(folder: Path | str) -> Storage:
    """Reads every tensor of `folder` and counts them; `CheckpointError` naming the first that is not sound.

    Headers agree with the index, every promised byte can be read, packed tensors have the shapes that weight_shape
    and the config ask for, what belongs to a packed weight is finite, and no other tensor holds a NaN.
    """
    with open_checkpoint(folder) as checkpoint:
        storage = checkpoint.storage()
        _check_folder(checkpoint, storage.total_bytes)
        packed = {name for linear in checkpoint.linears() for name in checkpoint.raw_members(linear)}
        for name in checkpoint.raw_names():
            _check_numbers(checkpoint, name, checkpoint.raw_load(name), finite=name in packed)
    return storage


def _check_folder(checkpoint: Checkpoint, total: int) -> None:
    """No safetensors file that nothing names, and the sum in the index is right."""
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        if path not in checkpoint.files:
            raise CheckpointError(f"{path} belongs to no index: remove it")
    index = checkpoint.folder / INDEX
    if index.exists():
        metadata = read_json(index).get("metadata")
        said = metadata.get("total_size") if isinstance(metadata, dict) else None
        if said != total:
            raise CheckpointError(f"{index} says total_size {said!r}, its shards hold {total} bytes of tensors")


def _check_numbers(checkpoint: Checkpoint, name: str, tensor: Tensor, finite: bool) -> None:
    if tensor.dtype not in _CHECKED:
        return
    bad = ~tensor.isfinite() if finite else tensor.isnan()
    if bool(bad.any()):
        what = "not finite" if finite else "NaN"
        raise CheckpointError(f"{checkpoint.folder}: tensor {name!r} has {int(bad.sum())} numbers that are {what}")

"""Reads a checkpoint back, every byte of it, the way a stranger would."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from sarqc.checkpoint.file_sums import changed_files
from sarqc.checkpoint.files import read_json
from sarqc.checkpoint.manifest import MANIFEST, Fingerprint, fingerprint, read_manifest
from sarqc.checkpoint.reader import Checkpoint
from sarqc.checkpoint.shards import INDEX
from sarqc.errors import CheckpointError, NumericError, SarqcError
from sarqc.method.weight import QuantizedWeight

Beside = Callable[[str, Tensor | QuantizedWeight], Iterable[str]]
_CHECKED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_finite(checkpoint: Checkpoint, inside: str) -> None:
    """`NumericError` for a NaN in a tensor that is stored under no name beginning with `inside`.

    Asked before a run: those tensors go into the result as they are, and it would be refused at the very end.
    """
    for name in checkpoint.raw_names():
        if name.startswith(inside):
            continue
        tensor = checkpoint.raw_load(name)
        if tensor.dtype in _CHECKED and bool(tensor.isnan().any()):
            raise NumericError(f"{name} holds NaN; repair the checkpoint before quantizing")


def check_fp16_range(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """`NumericError` naming the first tensor with a number beyond the range of `dtype`, in which the model is to run.

    Every tensor is read where that is float16 and they are stored in another dtype; a wider dtype holds all there is.
    """
    if dtype != torch.float16:
        return
    for name in checkpoint.names():
        if not checkpoint.dtype(name).is_floating_point or checkpoint.dtype(name) == dtype:
            continue
        largest = float(checkpoint.load(name).abs().nan_to_num(0.0, posinf=0.0).max())
        if largest > torch.finfo(dtype).max:
            raise NumericError(
                f"dtype = 'float16' does not hold {name}, which has numbers up to {largest:.3g}: "
                "use --dtype bfloat16 or float32"
            )


def problems(
    checkpoint: Checkpoint, on_tensor: Callable[[str], None] | None = None, beside: Beside | None = None
) -> Iterator[str]:
    """Everything that is wrong with an open checkpoint, a line each. Every tensor is read once, stacked experts twice.

    Headers agree with the index (seen when it was opened), every promised byte can be read, every tensor and every file
    beside the weights is the one of the manifest bit for bit, packed tensors have the shapes that the config defines
    and unpack to codes and zeros in range, what belongs to a packed weight is finite, and no other tensor holds a NaN.

    Args:
        checkpoint: The checkpoint.
        on_tensor: Called with the name of each tensor on disk after it was read.
        beside: Called with each dense tensor, or the codes it is stored as; what it finds wrong is added.
    """
    yield from _folder(checkpoint)
    manifest = read_manifest(checkpoint.folder)
    yield from changed_files(checkpoint.folder)
    if manifest is not None:
        yield from _names(checkpoint, manifest)
        for stack in checkpoint.stacks():
            if stack in manifest:
                yield from _changed(checkpoint, stack, checkpoint.raw_load(stack), manifest[stack])
    for name in checkpoint.names():
        linear, expanded = checkpoint.linear(name), checkpoint.expanded.get(name)
        read: dict[str, Tensor] = {}
        members = checkpoint.raw_members(linear) if linear else expanded.members if expanded else (name,)
        for member in members:
            try:
                read[member] = checkpoint.raw_load(member)
            except CheckpointError as error:
                yield str(error)
                continue
            if manifest is not None and member in manifest:
                yield from _changed(checkpoint, member, read[member], manifest[member])
            yield from _numbers(checkpoint, member, read[member], finite=linear is not None)
            if on_tensor is not None:
                on_tensor(member)
        if len(read) < len(members):
            continue
        try:
            stored: Tensor | QuantizedWeight
            if linear is not None:
                stored = checkpoint.unpack(linear, read.__getitem__)
            else:
                stored = read[name] if expanded is None else expanded.load(read.__getitem__)
        except SarqcError as error:
            yield str(error)
            continue
        if beside is not None:
            yield from beside(name, stored)


def _folder(checkpoint: Checkpoint) -> Iterator[str]:
    """A safetensors file that nothing names, and a wrong sum in the index."""
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        if path not in checkpoint.files:
            yield f"{path} belongs to no index: remove it"
    index = checkpoint.folder / INDEX
    if index.exists():
        metadata = read_json(index).get("metadata")
        declared = metadata.get("total_size") if isinstance(metadata, dict) else None
        total = sum(checkpoint.raw_entry(name).nbytes for name in checkpoint.raw_names())
        if declared != total:
            yield f"{index} says total_size {declared!r}, its shards hold {total} bytes of tensors"


def _names(checkpoint: Checkpoint, manifest: Mapping[str, Fingerprint]) -> Iterator[str]:
    """Tensors that only the manifest or only the files have."""
    names = set(checkpoint.raw_names())
    for name in sorted(manifest.keys() - names):
        yield f"{checkpoint.folder} lacks tensor {name!r}, which {MANIFEST} lists"
    for name in sorted(names - manifest.keys()):
        yield f"{checkpoint.folder} holds tensor {name!r}, which {MANIFEST} does not list"


def _changed(checkpoint: Checkpoint, name: str, tensor: Tensor, written: Fingerprint) -> Iterator[str]:
    """A tensor that is not what was written."""
    actual = fingerprint(tensor)
    if (actual.dtype, actual.shape) != (written.dtype, written.shape):
        yield (
            f"{checkpoint.folder}: tensor {name!r} is {actual.dtype} {actual.shape}, where {written.dtype} "
            f"{written.shape} was written"
        )
    elif actual.sha256 != written.sha256:
        yield f"{checkpoint.folder}: tensor {name!r} has changed since it was written: its sha256 is another"


def _numbers(checkpoint: Checkpoint, name: str, tensor: Tensor, finite: bool) -> Iterator[str]:
    if tensor.dtype not in _CHECKED:
        return
    bad = ~tensor.isfinite() if finite else tensor.isnan()
    if bool(bad.any()):
        what = "not finite" if finite else "NaN"
        yield f"{checkpoint.folder}: tensor {name!r} has {int(bad.sum())} numbers that are {what}"

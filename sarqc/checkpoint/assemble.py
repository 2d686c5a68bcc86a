"""From finished shards to a checkpoint: names, an index and a manifest; no tensor is unpacked.

A finished shard is renamed, and copied only from another file system. The tensors that are in none go to shards of
their own, in which they fill up to 5 GB. A shard of a block is as large as the block: readers map files, so a file of
20 GB is no worse than four of 5, and to split it would be to write it twice.

Where all tensors together are small, they become one file, which is what people expect of a small model, at the price
of writing them twice: at the limit that is a second or two, which is less than it takes to load the model once.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from sarqc.checkpoint.files import write_json
from sarqc.checkpoint.headers import Entry
from sarqc.checkpoint.manifest import Fingerprint, write_manifest
from sarqc.checkpoint.shards import INDEX, SINGLE
from sarqc.checkpoint.state import ChunkedTensor, SummedShard, write_shard
from sarqc.conventions import DTYPES
from sarqc.errors import CheckpointError

MERGE_BYTES = 1_000_000_000
"""Bytes of tensors up to which a checkpoint is one file."""
SHARD_BYTES = 5_000_000_000
"""Bytes up to which tensors that are in no finished shard fill a shard; a larger one gets a shard of its own."""
_NAME = re.compile(r"model-(\d{5,})-of-\d{5,}\.safetensors")

Sums = Mapping[str, Fingerprint]


def shard_name(number: int, count: int) -> str:
    """The conventional name of shard `number` (from 1) of `count`."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def shard_number(path: Path) -> int | None:
    """The number in a conventional name, None for another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def assemble(folder: Path, shards: Sequence[tuple[Path, Sums]], rest: Mapping[str, ChunkedTensor]) -> None:
    """Make the weights of a checkpoint in the empty `folder`, of finished `shards` and of the tensors `rest`.

    A shard that is renamed has the number of its place in `shards`, from 1. Files that are not renamed are on disk when
    this returns. `CheckpointError` where two shards hold a tensor, or one that is copied into a single file is not what
    was written; `ResourceError` where the disk fails or is full.
    """
    manifest = _joined(shards, rest)
    sizes = [nbytes(one) for _, sums in shards for one in sums.values()] + [one.nbytes for one in rest.values()]
    if sum(sizes) <= MERGE_BYTES:
        manifest |= _merge(folder / SINGLE, shards, rest)
    else:
        groups = _groups(rest)
        count = len(shards) + len(groups)
        home: dict[str, str] = {}
        for number, group in enumerate(groups, len(shards) + 1):
            name = shard_name(number, count)
            manifest |= write_shard(folder / name, group)
            home |= dict.fromkeys(group, name)
        for number, (path, sums) in enumerate(shards, 1):
            name = shard_name(number, count)
            _place(path, folder / name)
            home |= dict.fromkeys(sums, name)
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": home})
    write_manifest(folder, manifest)


def nbytes(one: Fingerprint) -> int:
    """Bytes of the tensor that was written."""
    return Entry(DTYPES[one.dtype], tuple(one.shape), 0).nbytes


def _joined(shards: Sequence[tuple[Path, Sums]], rest: Mapping[str, ChunkedTensor]) -> dict[str, Fingerprint]:
    """Sums of all shards together."""
    fingerprints: dict[str, Fingerprint] = {}
    for path, sums in shards:
        if twice := sorted(sums.keys() & (fingerprints.keys() | rest.keys())):
            raise CheckpointError(f"{path} holds tensor {twice[0]!r}, which another shard holds too")
        fingerprints |= sums
    return fingerprints


def _merge(
    path: Path, shards: Sequence[tuple[Path, Sums]], rest: Mapping[str, ChunkedTensor]
) -> dict[str, Fingerprint]:
    """Copy the bytes of all tensors to one file, comparing sums on the way."""
    with ExitStack() as opened:
        tensors = dict(rest)
        for place, sums in shards:
            shard = opened.enter_context(SummedShard(place, sums))
            tensors |= {name: shard.parts(name) for name in shard.names()}
        try:
            return write_shard(path, tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; the same command makes a damaged block again") from error


def _groups(tensors: Mapping[str, ChunkedTensor]) -> list[dict[str, ChunkedTensor]]:
    """Tensors in order, as many to a group as fit a shard."""
    groups: list[dict[str, ChunkedTensor]] = []
    room = 0
    for name, tensor in tensors.items():
        if not groups or tensor.nbytes > room:
            groups.append({})
            room = SHARD_BYTES
        groups[-1][name] = tensor
        room -= tensor.nbytes
    return groups


def _place(path: Path, target: Path) -> None:
    """Rename a file, or copy it where `target` is on another file system."""
    try:
        path.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise CheckpointError(f"{path} cannot be moved to {target}: {error.strerror}") from error
        try:
            shutil.copyfile(path, target)
        except OSError as failed:
            raise CheckpointError(f"{target} cannot be written: {failed.strerror or failed}") from failed

"""One open safetensors file, and the list of them that makes a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import torch
from torch import Tensor

from sarqc.checkpoint.files import file_in, read_json
from sarqc.checkpoint.headers import read_header
from sarqc.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
"""What peft leaves where it saves an adapter."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PART = 16_000_000


class Shard:
    """A safetensors file, opened and checked once, whose tensors are read one at a time into memory of their own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = read_header(path)
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error

    def load(self, name: str) -> Tensor:
        """Tensor `name` on the CPU, bit for bit as on disk; safe to call from several threads."""
        entry = self.entries[name]
        return self._read(name, entry.begin, entry.nbytes).view(entry.dtype).view(entry.shape)

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Elements first .. first + count along the first dimension of a tensor, reading nothing else of it."""
        entry = self.entries[name]
        row = entry.nbytes // entry.shape[0]
        data = self._read(name, entry.begin + first * row, count * row)
        return data.view(entry.dtype).view(count, *entry.shape[1:])

    def parts(self, name: str) -> Iterator[Tensor]:
        """A tensor in pieces along its first dimension of about 16 MB; one without dimensions is one piece."""
        entry = self.entries[name]
        if not entry.nbytes or not entry.shape:
            yield self.load(name)
            return
        step = max(1, _PART * entry.shape[0] // entry.nbytes)
        for first in range(0, entry.shape[0], step):
            yield self.rows(name, first, min(step, entry.shape[0] - first))

    def _read(self, name: str, begin: int, count: int) -> Tensor:
        """Bytes of the file, uint8 [count], in memory of their own."""
        data = torch.empty(count, dtype=torch.uint8)
        view = data.numpy().data
        filled = 0
        try:
            while filled < count:  # one read gives at most 2 GB
                read = os.preadv(self._file.fileno(), [view[filled:]], begin + filled)
                if not read:
                    raise CheckpointError(f"{self.path} ended inside tensor {name!r}: it changed while it was read")
                filled += read
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read at tensor {name!r}: {error.strerror}") from error
        return data

    def close(self) -> None:
        """Closes the file; no tensor can be read afterwards."""
        self._file.close()


def find_shards(folder: Path) -> dict[Path, frozenset[str] | None]:
    """The safetensors files of `folder` and the tensors that the index promises in each (None without an index).

    As in transformers, `model.safetensors` comes before an index. `CheckpointError` where there is neither, and for
    an index that cannot be trusted.
    """
    if (single := file_in(folder, SINGLE)) is not None:
        return {single: None}
    if (index := file_in(folder, INDEX)) is None:
        raise CheckpointError(_nothing(folder))
    promised: dict[str, set[str]] = {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index} has no "weight_map" that says which shard holds which tensor')
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index} puts tensor {tensor!r} in {shard!r}: only .safetensors files are read")
        if PureWindowsPath(shard).name != shard:  # no folder, no drive, no "..", and one spelling for each file
            raise CheckpointError(f"{index} puts tensor {tensor!r} in {shard!r}: shards must lie beside their index")
        promised.setdefault(shard, set()).add(tensor)
    shards: dict[Path, frozenset[str] | None] = {}
    for shard in sorted(promised):
        if (path := file_in(folder, shard)) is None:
            raise CheckpointError(f"{folder / shard} is missing: {index.name} names it; fetch the model again")
        shards[path] = frozenset(promised[shard])
    return shards


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights of any kind, read or refused, and is not a configuration alone."""
    return any(folder.glob("*.safetensors")) or bool(_pickles(folder))


def _pickles(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)


def _nothing(folder: Path) -> str:
    """Why a folder without safetensors is refused."""
    if (folder / ADAPTER).exists():
        return f"{folder} holds an adapter and no model: merge it into its base model first, and give the result"
    if pickles := _pickles(folder):
        return (
            f"{folder} holds no {SINGLE} but the pickle file {pickles[0]!r}: pickle files can run code and are not "
            "read; convert the model to safetensors (save_pretrained in transformers does)"
        )
    return f"{folder} holds neither {SINGLE} nor {INDEX}: it is not a model in safetensors files"


def check_index(index: Path, shards: dict[str, Shard], promised: dict[str, frozenset[str]]) -> None:
    """Compares an index with the headers of all its shards, both by file name; `CheckpointError` where they differ."""
    home = {tensor: name for name, tensors in promised.items() for tensor in tensors}
    for name, shard in shards.items():
        for tensor in sorted(promised[name] - shard.entries.keys()):
            raise CheckpointError(f"{shard.path} lacks tensor {tensor!r}, which {index.name} says it holds")
        for tensor in sorted(shard.entries.keys() - promised[name]):
            if tensor in home:
                raise CheckpointError(f"{shard.path} and {home[tensor]} both hold tensor {tensor!r}: keep it in one")
            raise CheckpointError(f"{shard.path} holds tensor {tensor!r}, which {index.name} does not list")

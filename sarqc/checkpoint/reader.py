"""Tensors of a checkpoint by name, one at a time; of a quantized one, in a dense view.

Opening reads every header and no tensor. In the dense view of a quantized checkpoint the tensors that make up a
Linear's packed weight (`P.weight_packed`, `P.weight_scale`, ...) appear as the one tensor they stand for, `P.weight`,
so that callers need not know that they were quantized. So do weights in low precision (`low_precision`),
which are no quantized Linears: they have no codes that are read. The `raw_` methods show what is on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sarqc.checkpoint.files import file_in, read_json
from sarqc.checkpoint.formats import FORMATS, detect, quantization_of
from sarqc.checkpoint.formats.stacked import experts_of
from sarqc.checkpoint.headers import Entry
from sarqc.checkpoint.low_precision import Expanded, dense_view, is_low_precision
from sarqc.checkpoint.shards import INDEX, Shard, check_index, find_shards
from sarqc.config import QuantConfig
from sarqc.contexts import Closing
from sarqc.conventions import MatrixSlice
from sarqc.errors import CheckpointError
from sarqc.method.weight import QuantizedWeight, WeightInfo


@dataclass(frozen=True)
class Storage:
    """What a checkpoint takes on disk.

    tensors, shards: numbers of them on disk. total_bytes: of all tensors. quantized_linears: number of them;
    quantized_bytes and quantized_weights: bytes on disk of all that belongs to them, and elements they stand for.
    """

    tensors: int
    shards: int
    total_bytes: int
    quantized_linears: int
    quantized_bytes: int
    quantized_weights: int

    @property
    def bits_per_weight(self) -> float | None:
        """Bits on disk of each quantized weight, scales and zeros included; None where nothing is quantized."""
        return 8 * self.quantized_bytes / self.quantized_weights if self.quantized_weights else None

    def record(self) -> dict[str, Any]:
        """What a report says of the size."""
        return {
            "bytes": self.total_bytes,
            "quantized_weights": self.quantized_weights,
            "quantized_bytes": self.quantized_bytes,
            "bits_per_weight": round(self.bits_per_weight or 0.0, 3),
        }


class Checkpoint(Closing):
    """An open checkpoint; made by `open_checkpoint`. Safe to load from in several threads.

    folder: where it lies. config: its config.json. format: the `Format` it is quantized in, or None. expanded: its
    weights in low precision.
    """

    def __init__(self, folder: Path, config: dict[str, Any], shards: list[Shard]) -> None:
        self.folder = folder
        self.config = config
        self._quantization = quantization_of(config)
        low = is_low_precision(self._quantization)
        self.format = None if low else detect(config)
        self._shards = shards
        self._home = {name: shard for shard in shards for name in shard.entries}
        self._slices: dict[str, MatrixSlice] = {}
        self._described: dict[str, WeightInfo] = {}
        self._rows = self._rows_of_stacks()
        self.expanded: Mapping[str, Expanded] = {}
        hidden: frozenset[str] = frozenset()
        if low:
            with self._named():
                view = dense_view({name: self.raw_entry(name) for name in self._home}, self._quantization, config)
            self.expanded, hidden = view.weights, view.hidden
        self._linears = {} if low else self._quantized_linears()
        packed = {name for names in self._linears.values() for name in names}
        dense = {f"{linear}.weight" for linear in self._linears}
        self._names = sorted((self.parts() - packed - hidden) | dense | self.expanded.keys())

    def _rows_of_stacks(self) -> dict[str, tuple[str, int]]:
        """Where each tensor of a single expert lies, in a format that has one tensor of those of all experts."""
        if self.format is None or not self.format.stacked:
            return {}
        rows = {}
        for stack, shard in self._home.items():
            shape = shard.entries[stack].shape
            if not shape or 0 in shape:  # it has no bytes, so its number of experts is any number
                continue
            for expert, name in enumerate(experts_of(stack, shape[0], self._quantization)):
                rows[name] = (stack, expert)
        return rows

    def parts(self) -> set[str]:
        """Names of the tensors on disk, those of single experts in the place of stacks."""
        return (self._home.keys() - set(self.stacks())) | self._rows.keys()

    def stacks(self) -> list[str]:
        """Tensors on disk that hold those of several experts; `raw_load` gives both."""
        return list(dict.fromkeys(stack for stack, _ in self._rows.values()))

    def _quantized_linears(self) -> dict[str, tuple[str, ...]]:
        """Names of the tensors on disk of each quantized Linear; refuses what no format explains."""
        if self.format is not None:
            with self._named():
                return self.format.linears(self.parts(), self._quantization)
        if self._quantization:
            method = self._quantization.get("quant_method")
            raise CheckpointError(
                f"{self.folder} is quantized already, with quant_method {method!r}, which is not read; "
                f"{', '.join(FORMATS)} are: start from the unquantized model"
            )
        for name in self._home:
            if name.endswith((".weight_packed", ".qweight")):
                raise CheckpointError(
                    f"{self.folder} holds the packed tensor {name!r} but its config.json has no quantization_config"
                )
        return {}

    @property
    def files(self) -> list[Path]:
        """The safetensors files."""
        return [shard.path for shard in self._shards]

    def split(self, slices: Mapping[str, MatrixSlice]) -> Checkpoint:
        """Show single matrices, by name, in the place of the tensors that they lie in; this checkpoint, changed."""
        whole = {part.tensor for part in slices.values()}
        self._names = sorted((set(self._names) - whole) | slices.keys())
        self._slices |= slices
        return self

    def _matrix(self, tensor: str, expert: int | None) -> Tensor:
        """A tensor that is a matrix, or one matrix of several, reading no other where that is possible."""
        if expert is None:
            return self._whole(tensor)

        def one(name: str) -> Tensor:
            return self._shard(name).rows(name, expert, 1)

        expanded = self.expanded.get(tensor)
        if expanded is None:
            return one(tensor)[0]
        if all(self.raw_entry(name).shape[:1] == expanded.shape[:1] for name in expanded.members):
            return expanded.load(one)[0]
        return expanded.load(self.raw_load)[expert]

    def names(self) -> list[str]:
        """Names of the dense view, sorted."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of dense tensor `name`; reads no weights."""
        if name in self._slices:
            return self._slices[name].shape
        if name in self.expanded:
            return self.expanded[name].shape
        linear = self.linear(name)
        return self.describe(linear).shape if linear else self.raw_entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of dense tensor `name`; that of its scales where it is quantized."""
        if name in self._slices:
            name = self._slices[name].tensor
        if name in self.expanded:
            return self.expanded[name].dtype
        linear = self.linear(name)
        return self.describe(linear).dtype if linear else self.raw_entry(name).dtype

    def load(self, name: str) -> Tensor:
        """Dense tensor `name` on the CPU in memory of its own, dequantized where need be."""
        if (part := self._slices.get(name)) is not None:
            matrix = self._matrix(part.tensor, part.expert)
            rows = (matrix.mT if part.transposed else matrix)[part.start :: part.step][: part.shape[0]]
            return rows.clone(memory_format=torch.contiguous_format)
        return self._whole(name)

    def _whole(self, name: str) -> Tensor:
        if name in self.expanded:
            return self.expanded[name].load(self.raw_load)
        linear = self.linear(name)
        weight = self.quantized(linear) if linear else None
        return self.raw_load(name) if weight is None else weight.dequantize(weight.scales.dtype)[0]

    def linears(self) -> list[str]:
        """Names of the quantized Linears, without ".weight"."""
        return list(self._linears)

    def describe(self, linear: str) -> WeightInfo:
        """What the quantized Linear `linear` is, after checking its tensors against each other; reads no weights."""
        if linear not in self._described:
            self.raw_members(linear)
            assert self.format is not None
            with self._named():
                self._described[linear] = self.format.describe(
                    linear, self._quantization, self.raw_entry, self.raw_load
                )
        return self._described[linear]

    def quantized(self, linear: str) -> QuantizedWeight | None:
        """Codes, scales and zeros of `linear` (named without ".weight", E = 1); None where it is not quantized."""
        return self.unpack(linear, self.raw_load) if linear in self._linears else None

    def unpack(self, linear: str, load: Callable[[str], Tensor]) -> QuantizedWeight:
        """The weight of the quantized Linear `linear`, of its tensors on disk as `load(name)` returns them."""
        assert self.format is not None
        with self._named():
            return self.format.unpack(linear, self._quantization, load)

    def stored(self, name: str) -> Tensor | QuantizedWeight:
        """Dense tensor `name` as it is stored: its codes, scales and zeros where it is quantized."""
        linear = self.linear(name)
        return self.unpack(linear, self.raw_load) if linear else self.raw_load(name)

    def packer(self, linear: str) -> Callable[[QuantizedWeight], dict[str, Tensor]]:
        """Makes the tensors on disk of the quantized Linear `linear` of a weight; works when the files are closed."""
        stored = self.describe(linear)
        assert self.format is not None
        group_size = -1 if stored.groups == 1 else stored.shape[1] // stored.groups
        return partial(self.format.pack, linear, quant=QuantConfig(stored.bits, group_size, stored.sym))

    def storage(self) -> Storage:
        """What is on disk, counted from the headers after checking the tensors of every quantized Linear."""
        packed = [name for names in self._linears.values() for name in names]
        return Storage(
            tensors=len(self._home),
            shards=len(self._shards),
            total_bytes=sum(self.raw_entry(name).nbytes for name in self._home),
            quantized_linears=len(self._linears),
            quantized_bytes=sum(self.raw_entry(name).nbytes for name in packed),
            quantized_weights=sum(prod(self.describe(linear).shape) for linear in self._linears),
        )

    def raw_names(self) -> list[str]:
        """Names on disk, sorted."""
        return sorted(self._home)

    def raw_members(self, linear: str) -> tuple[str, ...]:
        """Names on disk of the tensors that make up the weight of the quantized Linear `linear`."""
        if linear not in self._linears:
            raise CheckpointError(f"{self.folder} has no quantized Linear {linear!r}")
        return self._linears[linear]

    def raw_entry(self, name: str) -> Entry:
        """Dtype and shape on disk of tensor `name`."""
        if name in self._rows:
            entry = self.raw_entry(self._rows[name][0])
            return Entry(entry.dtype, entry.shape[1:], 0)
        return self._shard(name).entries[name]

    def raw_load(self, name: str) -> Tensor:
        """Tensor `name` as it is on disk, bit for bit, on the CPU in memory of its own."""
        if name in self._rows:
            stack, expert = self._rows[name]
            return self._shard(stack).rows(stack, expert, 1)[0]
        return self._shard(name).load(name)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Puts the folder's name before what a format, which knows no files, complains of."""
        try:
            yield
        except CheckpointError as error:
            raise error if str(self.folder) in str(error) else CheckpointError(f"{self.folder}: {error}") from error

    def linear(self, name: str) -> str | None:
        """The quantized Linear whose weight is called `name`, if there is one."""
        linear = name.removesuffix(".weight")
        return linear if linear != name and linear in self._linears else None

    def _shard(self, name: str) -> Shard:
        if (shard := self._home.get(name)) is None:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}")
        return shard

    def close(self) -> None:
        """Closes the files."""
        for shard in self._shards:
            shard.close()


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Opens the checkpoint in `folder`: config.json with `model.safetensors`, or shards and their index.

    Every header is read and compared with the index. `CheckpointError` with one line for whatever is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist")
    if (config_file := file_in(folder, "config.json")) is None:
        raise CheckpointError(f"{folder} has no config.json: it is not the folder of a Hugging Face model")
    config = read_json(config_file)
    promised = find_shards(folder)
    with ExitStack() as opened:  # closes what is open if a later check fails
        shards: dict[str, Shard] = {}
        for path in promised:
            shards[path.name] = Shard(path)
            opened.callback(shards[path.name].close)
        listed = {path.name: tensors for path, tensors in promised.items() if tensors is not None}
        if listed:
            check_index(folder / INDEX, shards, listed)
        checkpoint = Checkpoint(folder, config, list(shards.values()))
        opened.pop_all()
    return checkpoint

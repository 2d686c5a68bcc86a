"""From one format of quantized weights to another: the same codes, scales and zeros in another order of bits.

Nothing is rounded, so nothing is lost; what the other format cannot hold is refused before the output exists. Tensors
are converted one at a time and written a shard at a time; at the end each is read back and compared with its source.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sarqc.checkpoint.assemble import MERGE_BYTES, Sums, assemble
from sarqc.checkpoint.differences import difference, other_names
from sarqc.checkpoint.file_sums import record_files
from sarqc.checkpoint.formats import Format, quantization_of
from sarqc.checkpoint.formats.common import outside_blocks
from sarqc.checkpoint.formats.stacked import stack_of
from sarqc.checkpoint.reader import Checkpoint, open_checkpoint
from sarqc.checkpoint.side_files import copy_side_files, write_config
from sarqc.checkpoint.state import ChunkedTensor, write_shard
from sarqc.checkpoint.verify import problems
from sarqc.config import QuantConfig
from sarqc.errors import CheckpointError
from sarqc.options import record

Progress = Callable[[int, int, str], None]
"""Called as progress(done, total, name of the tensor)."""


class Conversion:
    """A quantized checkpoint and the format it is to be written in.

    quant: what all its Linears follow. embeddings: which of its quantized matrices are such. Raises `CheckpointError`
    for what the format cannot hold.
    """

    def __init__(self, checkpoint: Checkpoint, target: Format, embeddings: Collection[str] = ()) -> None:
        if checkpoint.format is None:
            raise CheckpointError(f"{checkpoint.folder} is not quantized: `sarqc quantize` does that")
        self.checkpoint, self.target = checkpoint, target
        self.quant, self._bits = spec_of(checkpoint, embeddings)
        target.check(self.quant)
        for linear in embeddings:
            target.check_embedding(linear)
        for linear in set(_heads(checkpoint)).difference(embeddings):
            target.check_head(linear)
        for linear in checkpoint.linears():
            target.check_layer(linear, checkpoint.describe(linear).shape, self.quant)
        for name in checkpoint.names():
            if checkpoint.linear(name) is None:
                target.check_dense(name, checkpoint.shape(name))
        for members in units(checkpoint.names(), target):
            self._check_alike(members)

    def write(self, folder: Path, *, code: bool = False, progress: Progress | None = None) -> dict[str, Any]:
        """Write it into the empty `folder`, side files included, and read all of it back.

        Args:
            folder: An empty folder.
            code: Copy the Python files of the model too.
            progress: Called after each tensor.

        Returns:
            From, to and what it takes on disk, as JSON values.

        Raises:
            CheckpointError: What was written is not what was read.
        """
        self._write(folder, progress)
        copy_side_files(self.checkpoint.folder, folder, code=code)
        quantization = self.target.config(self.quant, ignored(self.checkpoint), self._bits)
        write_config(folder, self.checkpoint.config, self.target, quantization)
        record_files(folder)
        return self._checked(folder)

    def _write(self, folder: Path, progress: Progress | None) -> None:
        """Shards of about `MERGE_BYTES`, which is also what memory holds of converted tensors."""
        names, shards = self.checkpoint.names(), list[tuple[Path, Sums]]()
        held, size, done = dict[str, Tensor](), 0, 0
        for members in units(names, self.target):
            tensors = self._joined(members)
            held |= tensors
            size += sum(tensor.nbytes for tensor in tensors.values())
            if size > MERGE_BYTES:
                path = folder / f".{len(shards)}.safetensors"
                shards.append((path, write_shard(path, held)))
                held, size = {}, 0
            for name in members:
                done += 1
                if progress is not None:
                    progress(done, len(names), name)
        assemble(folder, shards, {name: ChunkedTensor.of(tensor) for name, tensor in held.items()})

    def _joined(self, members: Sequence[str]) -> dict[str, Tensor]:
        """The tensors on disk of one of the dense view, or of the matrices of a stack."""
        by_name: dict[str, list[Tensor]] = {}
        for name in members:
            for full, tensor in self._packed(name).items():
                by_name.setdefault(stacked_name(full, self.target)[0], []).append(tensor)
        alone = stacked_name(members[0], self.target)[0] == members[0]
        return {name: parts[0] if alone else torch.stack(parts) for name, parts in by_name.items()}

    def _check_alike(self, members: Sequence[str]) -> None:
        """`CheckpointError` where the matrices of a stack differ in what one tensor has to have alike."""
        kinds = {name: self._kind(name) for name in members}
        first = members[0]
        for name, kind in kinds.items():
            if kind != kinds[first]:
                raise CheckpointError(
                    f"{name!r} has other bits, shape or dtype than {first!r}, where {self.target.name} keeps all "
                    "experts of a layer in one tensor: use format compressed-tensors"
                )

    def _kind(self, name: str) -> tuple[object, ...]:
        linear = self.checkpoint.linear(name)
        bits = self.checkpoint.describe(linear).bits if linear else None
        return self.checkpoint.shape(name), self.checkpoint.dtype(name), bits

    def _packed(self, name: str) -> dict[str, Tensor]:
        """The tensors on disk of one of the dense view."""
        stored = self.checkpoint.stored(name)
        if isinstance(stored, Tensor):
            return {name: stored}
        return self.target.pack(name.removesuffix(".weight"), stored, self.quant.at(stored.bits))

    def _checked(self, folder: Path) -> dict[str, Any]:
        """Read all of it back; what it is in numbers, or `CheckpointError`."""
        with closing(open_checkpoint(folder)) as written:
            problem = other_names(written, self.checkpoint)
            problem = problem or next(problems(written, beside=partial(difference, written, self.checkpoint)), None)
            if problem is not None:
                raise CheckpointError(f"the converted checkpoint is not the one it was made of: {problem}")
            stored = written.storage()
            assert written.format is not None and self.checkpoint.format is not None
            return {
                "from": self.checkpoint.format.name,
                "format": written.format.name,
                "quant": record(self.quant),
                "tensors": stored.tensors,
                **stored.record(),
                "quantized_linears": stored.quantized_linears,
            }


def stacked_name(name: str, target: Format) -> tuple[str, int]:
    """What a tensor is called in the format: its stack and its place there, or itself."""
    return (stack_of(name) if target.stacked else None) or (name, 0)


def units(names: Sequence[str], target: Format) -> list[list[str]]:
    """Names that are written together: the experts of a stack in order, where the format has any; others alone."""
    stacks: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        stack, expert = stacked_name(name, target)
        stacks.setdefault(stack, []).append((expert, name))
    return [[name for _, name in sorted(members)] for members in stacks.values()]


def spec_of(checkpoint: Checkpoint, embeddings: Collection[str] = ()) -> tuple[QuantConfig, dict[str, int]]:
    """The spec that all quantized Linears follow, and the bits of each; `CheckpointError` where groups differ.

    embeddings: those of them that are such.
    """
    infos = {linear: checkpoint.describe(linear) for linear in checkpoint.linears()}
    if not infos:
        raise CheckpointError(f"{checkpoint.folder} says it is quantized but holds no quantized Linear")
    channel = all(info.groups == 1 for info in infos.values())
    sizes = {linear: -1 if channel else info.shape[1] // info.groups for linear, info in infos.items()}
    first, group_size = next(iter(sizes.items()))
    for linear, size in sizes.items():
        if size != group_size:
            raise CheckpointError(
                f"{checkpoint.folder}: {linear!r} has groups of {size}, {first!r} has groups of {group_size}: only "
                "checkpoints with groups of one size are converted"
            )
    if group_size != -1 and group_size < 8:
        raise CheckpointError(f"{checkpoint.folder} has groups of {group_size} inputs: 8 is the least that is written")
    # Lazy, so that a checkpoint with real zeros is read no further than to the first of them.
    sym = all(info.sym or checkpoint.unpack(linear, checkpoint.raw_load).sym for linear, info in infos.items())
    widths = {linear: info.bits for linear, info in infos.items()}
    choices = tuple(sorted(set(widths.values())))
    if len(choices) == 1:
        return QuantConfig(choices[0], group_size, sym), widths
    own = {widths[name] for name in embeddings}
    others = {bits for name, bits in widths.items() if name not in embeddings}
    if len(others) == len(own) == 1:
        include = tuple(embeddings)
        return QuantConfig(others.pop(), group_size, sym, include=include, embedding_bits=own.pop()), widths
    average = round(checkpoint.storage().bits_per_weight or 0.0, 3)
    return QuantConfig(group_size=group_size, sym=sym, avg_bits=average, bit_options=choices), widths


def _heads(checkpoint: Checkpoint) -> list[str]:
    """Quantized Linears outside the blocks with an output for each word of the vocabulary."""
    configs = (checkpoint.config, checkpoint.config.get("text_config"))
    words = {config.get("vocab_size") for config in configs if isinstance(config, dict)}
    return [one for one in outside_blocks(checkpoint.linears()) if checkpoint.describe(one).shape[0] in words]


def ignored(checkpoint: Checkpoint) -> list[str]:
    """Full names of Linears left unquantized: what the config names, and every other matrix that is no embedding."""
    assert checkpoint.format is not None
    linears = set(checkpoint.linears())
    names = dict.fromkeys(checkpoint.format.ignored(quantization_of(checkpoint.config)))
    for name in checkpoint.names():
        linear = name.removesuffix(".weight")
        if linear != name and linear not in linears:
            shape = checkpoint.shape(name)
            if len(shape) == 2 and shape[0] != checkpoint.config.get("vocab_size"):
                names[linear] = None
    return [name for name in names if name not in linears]

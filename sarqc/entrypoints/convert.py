"""From one format of quantized weights to another: the same codes, scales and zeros in another order of bits.

Nothing is rounded, so nothing is lost; what the other format cannot hold is refused before the output exists. Tensors
go through one at a time, and at the end every one of them is read back and compared with where it came from.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sarqc.checkpoint.differences import differences
from sarqc.checkpoint.folders import atomic_folder, refuse_existing, refuse_overlap
from sarqc.checkpoint.formats import FORMATS, Format, quantization_of
from sarqc.checkpoint.reader import Checkpoint, open_checkpoint
from sarqc.checkpoint.side_files import copy_side_files, write_config
from sarqc.checkpoint.verify import problems
from sarqc.checkpoint.writer import ShardWriter
from sarqc.config import QuantConfig
from sarqc.errors import ArgumentError, CheckpointError
from sarqc.model.hub import locate
from sarqc.options import record
from sarqc.report import report as reports


@dataclass(frozen=True)
class Converted:
    """out: the new folder. record: from, to and what it takes on disk, as JSON values."""

    out: Path
    record: dict[str, Any]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    format: str,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Converted:
    """Write the quantized checkpoint `source` in another format to the folder `out`, whole or not at all.

    source: folder or hub id. format: a key of the table of formats. progress(done, total, tensor) follows it.
    Symmetric is what has every zero in the middle, whatever its config says. Raises `ArgumentError` for an unknown
    format and `CheckpointError` for what the format cannot hold: bits, sizes, scales, or groups that differ.
    """
    if format not in FORMATS:
        raise ArgumentError(f"format = {format!r} is not known: use {', '.join(FORMATS)}")
    target = FORMATS[format]
    out = Path(out).expanduser()
    refuse_existing(out, overwrite)
    folder = locate(source, trust_remote_code=trust_remote_code)
    refuse_overlap(out, folder)
    with open_checkpoint(folder) as checkpoint:
        if checkpoint.format is None:
            raise CheckpointError(f"{folder} is not quantized: `sarqc quantize` does that")
        quant, widths = spec_of(checkpoint)
        target.check(quant)
        for linear in checkpoint.linears():
            target.check_layer(linear, checkpoint.describe(linear).shape, quant)
        with atomic_folder(out, overwrite=overwrite) as partial:
            _write(checkpoint, partial, target, quant, progress)
            copy_side_files(folder, partial, code=trust_remote_code)
            write_config(partial, checkpoint.config, target.config(quant, _ignored(checkpoint), widths))
            record = _checked(partial, checkpoint, quant)
            if (report := reports.whole(folder)) is not None:
                reports.write(partial, report | _told(report, record))
    return Converted(out, record)


def spec_of(checkpoint: Checkpoint) -> tuple[QuantConfig, dict[str, int]]:
    """The spec that all quantized Linears follow, and the bits of each; `CheckpointError` where groups differ."""
    found = {linear: checkpoint.describe(linear) for linear in checkpoint.linears()}
    if not found:
        raise CheckpointError(f"{checkpoint.folder} says it is quantized but holds no quantized Linear")
    channel = all(info.groups == 1 for info in found.values())
    sizes = {linear: -1 if channel else info.shape[1] // info.groups for linear, info in found.items()}
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
    sym = all(info.sym or _centred(checkpoint, linear) for linear, info in found.items())
    widths = {linear: info.bits for linear, info in found.items()}
    choices = tuple(sorted(set(widths.values())))
    if len(choices) == 1:
        return QuantConfig(choices[0], group_size, sym), widths
    average = round(checkpoint.storage().bits_per_weight or 0.0, 3)
    return QuantConfig(group_size=group_size, sym=sym, avg_bits=average, bit_options=choices), widths


def _centred(checkpoint: Checkpoint, linear: str) -> bool:
    weight = checkpoint.quantized(linear)
    return weight is not None and weight.sym


def _ignored(checkpoint: Checkpoint) -> list[str]:
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


def _write(
    checkpoint: Checkpoint,
    partial: Path,
    target: Format,
    quant: QuantConfig,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    names = checkpoint.names()
    with ShardWriter(partial) as writer:
        for done, name in enumerate(names, 1):
            linear = name.removesuffix(".weight")
            weight = checkpoint.quantized(linear) if linear != name else None
            tensors = (
                {name: checkpoint.load(name)} if weight is None else target.pack(linear, weight, quant.at(weight.bits))
            )
            for full, tensor in tensors.items():
                writer.add(full, tensor)
            if progress is not None:
                progress(done, len(names), name)


def _told(report: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """What a report says of the files themselves, as they are now; who serves them is for `sarqc verify` to say."""
    before = report["size"]
    size = before | {
        "bytes": record["bytes"],
        "quantized_bytes": before["quantized_bytes"] + record["bytes"] - before["bytes"],
        "bits_per_weight": round(record["bits_per_weight"], 3),
    }
    return {"converted": record, "format": record["format"], "size": size, "serve": {}}


def _checked(partial: Path, source: Checkpoint, quant: QuantConfig) -> dict[str, Any]:
    """Reads all of it back; what it is in numbers, or `CheckpointError`."""
    with closing(open_checkpoint(partial)) as written:
        for problem in (*problems(written), *differences(written, source)):
            raise CheckpointError(f"the converted checkpoint is not the one it was made of: {problem}")
        stored = written.storage()
        assert written.format is not None and source.format is not None
        return {
            "from": source.format.name,
            "format": written.format.name,
            "quant": record(quant),
            "tensors": stored.tensors,
            "bytes": stored.total_bytes,
            "quantized_linears": stored.quantized_linears,
            "bits_per_weight": stored.bits_per_weight,
        }

"""`sarqc.checkpoint.convert` on a folder or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sarqc.checkpoint.convert import Conversion, Progress
from sarqc.checkpoint.folders import atomic_folder, check_existing, check_overlap
from sarqc.checkpoint.formats import FORMATS
from sarqc.checkpoint.formats.common import outside_blocks
from sarqc.checkpoint.reader import Checkpoint, open_checkpoint
from sarqc.errors import ArgumentError, ModelError
from sarqc.model.hub import locate
from sarqc.model.layers import targets_of
from sarqc.model.lazy_model import LazyModel
from sarqc.report import report as reports
from sarqc.report.schema import SIZES


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
    progress: Progress | None = None,
) -> Converted:
    """Write the quantized checkpoint `source` in another format to the folder `out`, whole or not at all.

    A checkpoint counts as symmetric if every zero is the middle code, whatever its config says.

    Args:
        source: Folder or hub id.
        out: Folder to write.
        format: Key of the table of formats.
        overwrite: Replace a checkpoint at `out`.
        trust_remote_code: Copy the Python files of the model too, and run them where something is quantized outside
            the blocks.
        progress: Called as progress(done, total, tensor).

    Returns:
        The new folder, and what was converted.

    Raises:
        ArgumentError: Unknown format.
        CheckpointError: The format cannot hold the checkpoint: bits, sizes, scales, or groups that differ.
    """
    if format not in FORMATS:
        raise ArgumentError(f"format = {format!r} is not known: use {', '.join(FORMATS)}")
    out = Path(out).expanduser()
    check_existing(out, overwrite)
    folder = locate(source, trust_remote_code=trust_remote_code)
    check_overlap(out, folder)
    with open_checkpoint(folder) as checkpoint:
        conversion = Conversion(checkpoint, FORMATS[format], _embeddings(checkpoint, trust_remote_code))
        with atomic_folder(out, overwrite=overwrite) as partial:
            record = conversion.write(partial, code=trust_remote_code, progress=progress)
            if (report := reports.whole(folder)) is not None:
                reports.write(partial, report | _changes(record))
    return Converted(out, record)


def _embeddings(checkpoint: Checkpoint, trust_remote_code: bool) -> list[str]:
    """The quantized matrices of a checkpoint that are embeddings; none where it is of no model that can be built."""
    if not outside_blocks(checkpoint.linears()):
        return []
    try:
        lazy = LazyModel.from_folder(checkpoint.folder, checkpoint, trust_remote_code=trust_remote_code)
    except ModelError:
        return []
    return [target.linear for target in targets_of(lazy, checkpoint.linears()).selected if target.embedding]


def _changes(record: dict[str, Any]) -> dict[str, Any]:
    """What a report says of the files, as they are now. Which runtimes support them is for `sarqc verify` to say."""
    size = {name: record[name] for name in SIZES}
    return {"converted": record, "format": record["format"], "size": size, "serve": {}}

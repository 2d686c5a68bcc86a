"""Which files of a checkpoint folder may be touched, and JSON in and out.

A checkpoint is data from a stranger. Names inside it (an index names its shards) and links inside it are therefore
followed only as far as the folder itself. The one exception is the Hugging Face cache, where every file of
`models--X/snapshots/<commit>/` is a link into `models--X/blobs/`: that layout is made by the client, not by the model.
Either of the two may be a link to another disk.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path, PureWindowsPath
from typing import Any

from sarqc.errors import CheckpointError

JSON_LIMIT = 100_000_000
"""Bytes of JSON that are read at most; the index of a model with 100 000 tensors has about 10 MB."""


DEPTH_LIMIT = 100
"""Objects inside objects at most; real files have about six."""


def file_in(folder: Path, name: str) -> Path | None:
    """The regular file `name` of `folder`, or None where there is none.

    `name` is relative to the folder. `CheckpointError` for a name that is absolute, has a drive or "..", and for a
    link that leads out of the folder.
    """
    # PureWindowsPath splits at both kinds of slash and sees drives, so a name is judged alike on every system.
    parsed = PureWindowsPath(name)
    if not parsed.parts or parsed.drive or parsed.root or ".." in parsed.parts or not name.isprintable():
        raise CheckpointError(f"{folder} names the file {name!r}, which is not a name inside that folder")
    path = folder / name
    if not os.path.lexists(path):
        return None
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # Python 3.11 and 3.12 raise RuntimeError for a link to itself
        raise CheckpointError(f"{path} is a link that leads nowhere: fetch the model again") from error
    if not any(target.is_relative_to(root) for root in _roots(folder)):
        raise CheckpointError(f"{path} is a link out of its folder, to {target}: put a copy of the file there instead")
    if not target.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    return path


def _roots(folder: Path) -> list[Path]:
    """Folders in which the files of `folder` may lie: itself, and the blobs of a Hugging Face cache."""
    real = folder.resolve()
    snapshots = [place.parent for place in (real, folder.absolute()) if place.parent.name == "snapshots"]
    return [real, *((place.parent / "blobs").resolve() for place in snapshots)]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; `CheckpointError` for anything else, a key given twice included."""
    try:
        with path.open("rb") as file:
            text = file.read(JSON_LIMIT + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(text) > JSON_LIMIT:
        raise CheckpointError(f"{path} is larger than the {JSON_LIMIT // 1_000_000} MB that are read of a JSON file")
    return parse_json(text, str(path))


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `text`; `what` names its origin in the error."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:  # json gives up like this on "[[[[..."
        raise CheckpointError(f"{what} is not usable JSON: nested too deep") from None
    except ValueError as error:
        raise CheckpointError(f"{what} is not usable JSON: {error}") from error
    if _deeper(value, DEPTH_LIMIT):
        raise CheckpointError(f"{what} is not usable JSON: nested too deep")
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a JSON {type(value).__name__}, where an object {{...}} is expected")
    return value


def _deeper(value: object, limit: int) -> bool:
    """Whether `value` has more than `limit` levels: whoever walks through it by recursion would fail on it."""
    level = [value]
    for _ in range(limit):
        inner: list[object] = []
        for node in level:
            inner += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        if not (level := [node for node in inner if isinstance(node, dict | list)]):
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} is given twice")
    return result


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes `value` as the ecosystem does (two spaces, sorted keys), as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, content: str) -> None:
    """Writes a small file; it appears whole or not at all, and what was there is never half replaced."""
    partial = path.with_name(f".{path.name}-{os.getpid()}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):  # the first error is the one to report
            partial.unlink()
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def write_all(file: FileIO, view: memoryview) -> None:
    """Writes all of `view`: one call takes 2 GB at most, and less where the disk is nearly full."""
    while view:
        view = view[file.write(view) :]


def sync(path: Path) -> None:
    """Forces a file or the names in a folder to disk, so that they outlive a power cut."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)

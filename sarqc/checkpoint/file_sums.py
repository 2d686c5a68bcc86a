"""The files beside the weights in the manifest: config, tokenizer, chat template, generation settings, licence.

    "files": {"config.json": {"sha256": "...", "size": 1234, "values": {"text_config.hidden_size": "64", ...}}}

`values` are those of a JSON object, objects inside it taken apart, so that a change can be named; one that is long
stands there by its sum, and a large file has none. Files that change after a run (report, model card) are not recorded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sarqc.checkpoint.files import file_in, parse_json, read_json, write_json
from sarqc.checkpoint.manifest import MANIFEST
from sarqc.checkpoint.side_files import side_files
from sarqc.errors import CheckpointError

_ALSO = ("config.json", "quantize_config.json")
"""Files that are written beside the source's own."""
_LONGEST = 120
"""Characters of a value that stands there itself."""
_PARSED = 1 << 20
"""Bytes of a file whose values are recorded; a vocabulary is larger, and takes longer to take apart than to read."""
_NAMED = 4
"""Changed values of a file that are named."""


def record_files(folder: Path) -> None:
    """Adds the files beside the weights to the manifest of `folder`, which holds its tensors; all are there by now."""
    manifest = read_json(folder / MANIFEST)
    write_json(folder / MANIFEST, manifest | {"files": {name: _record(folder / name) for name in _present(folder)}})


def has_record(folder: Path) -> bool:
    """Whether the manifest, if there is one, has the files beside the weights: those of earlier versions have not."""
    return file_in(folder, MANIFEST) is not None and "files" in read_json(folder / MANIFEST)


def changed_files(folder: Path) -> Iterator[str]:
    """A line for each file that is not what was written, with what changed in it."""
    manifest = {} if file_in(folder, MANIFEST) is None else read_json(folder / MANIFEST)
    if "files" not in manifest:
        return
    written = manifest["files"]
    if not isinstance(written, dict) or not all(isinstance(one, dict) for one in written.values()):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: its files are {str(written)[:80]!r}")
    present = _present(folder)
    for name in sorted(written.keys() | set(present)):
        if name not in present:
            yield f"{folder} lacks the file {name}, which {MANIFEST} lists"
        elif name not in written:
            yield f"{folder} holds the file {name}, which {MANIFEST} does not list"
        elif hashlib.sha256(_content(folder / name)).hexdigest() != written[name].get("sha256"):
            now = _record(folder / name)
            yield f"{folder / name} has changed since it was written: {_difference(written[name], now)}"


def _present(folder: Path) -> list[str]:
    return sorted({*side_files(folder, code=True), *(name for name in _ALSO if file_in(folder, name) is not None)})


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _record(path: Path) -> dict[str, Any]:
    content = _content(path)
    record: dict[str, Any] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    if path.suffix == ".json" and len(content) <= _PARSED:
        with suppress(CheckpointError):  # of no JSON readers will say so; a change is found all the same
            record["values"] = dict(_values(parse_json(content, str(path))))
    return record


def _values(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Values of an object by their paths, as JSON."""
    for key, value in content.items():
        if isinstance(value, dict) and 0 < len(value) <= _LONGEST:
            yield from _values(value, f"{above}{key}.")
        else:
            text = json.dumps(value, sort_keys=True)
            yield f"{above}{key}", text if len(text) <= _LONGEST else hashlib.sha256(text.encode()).hexdigest()[:16]


def _difference(written: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    before, after = written.get("values"), now.get("values")
    if not isinstance(before, dict) or not isinstance(after, dict):
        same = now["size"] == written.get("size")
        return "other bytes" if same else f"it has {now['size']} bytes, where {written.get('size')} were written"
    names = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    changes = [f"{name} is {after.get(name, 'missing')}, was {before.get(name, 'missing')}" for name in names[:_NAMED]]
    if not changes:
        return "its values are the same, its layout is another"
    return "; ".join(changes) + (f"; and {len(names) - _NAMED} more" if len(names) > _NAMED else "")

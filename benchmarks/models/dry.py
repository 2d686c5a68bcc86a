"""Whether a dry run, which reads no weights, says beforehand what the run did."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

READINGS = ("headers", "config")
"""What a dry run has: of a model on a hub the headers of its weights too, of a folder without weights config.json."""
_WEIGHTS = ("*.safetensors", "*.index.json")
_OUTSIDE = ("outside the blocks", "not used by transformers", "ignore ")


def compared(source: Path, work: Path, row: dict[str, Any], settings: dict[str, Any]) -> dict[str, str]:
    """For each reading "same", or what a dry run says otherwise than the row's run: its refusal, the layers that it
    quantized, those that it left with their reasons, and the servers that take its result."""
    bare = work / "bare"
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns(*_WEIGHTS))
    answers = {}
    for reading in READINGS:
        said = _said(source, bare, reading, settings)
        apart = [] if said.get("error") == row["error"] else [f"error: {said.get('error') or 'no refusal'}"]
        if row["error"] and "ignore" in row:
            said = _said(source, bare, reading, settings | {"ignore": (row["ignore"],)})
        apart += _apart(said, row) if "linears" in row and not said.get("error") else []
        answers[reading] = "; ".join(apart) or "same"
    return answers


def _said(source: Path, bare: Path, reading: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What a dry run says in the words of a row; for headers the folders stand for a hub, if they hold any."""
    import sarqc
    from sarqc.checkpoint.headers import read_header
    from sarqc.errors import SarqcError
    from sarqc.pipeline import plan
    from sarqc.serving.compatibility import ranks_by_server

    files = source.glob("*.safetensors") if reading == "headers" else ()
    headers = {name: (one.shape, one.dtype) for file in files for name, one in read_header(file).items()}
    try:
        with mock.patch.multiple(plan, hub_configuration=lambda *_, **how: bare, hub_headers=lambda name: headers):
            preflight = sarqc.estimate("a/model" if headers else bare, bare.parent / "none", **settings)
    except SarqcError as error:
        return {"error": str(error).replace(str(bare), "the folder")}
    left: dict[str, set[str]] = {}
    for one in preflight.kinds:
        if one.left and not one.left.startswith(_OUTSIDE):
            left.setdefault(kind_of(one.name), set()).add(one.left)
    return {
        "linears": preflight.quantized_linears,
        "layers": sorted({kind_of(one.name) for one in preflight.kinds if one.left is None}),
        "left": left,
        "serve": ranks_by_server(preflight.serve),
    }


def _apart(said: dict[str, Any], row: dict[str, Any]) -> list[str]:
    left, did = said.pop("left"), row["left"]
    apart = [f"{key}: {value}, not {row[key]}" for key, value in said.items() if value != row.get(key, value)]
    lines = {name: (left.get(name, {None}), did.get(name)) for name in sorted(left.keys() | did.keys())}
    return apart + [f"{name}: left as {those}, not {why}" for name, (those, why) in lines.items() if why not in those]


def kind_of(linear: str) -> str:
    """A layer's name behind the number of its block, with stars for further numbers."""
    from sarqc.conventions import star

    return star(linear).partition(".*.")[2] or star(linear)

"""What a run leaves behind beside the weights: report.json, and what is made of it.

report.json holds every setting and every number of the run. report.html (`page`) and the model card (`card`)
show the same to readers; both are functions of report.json alone, so `write` writes the three together and `rebuild`
makes the page again wherever only report.json survived. Readers take older reports, which lack some keys, and newer
ones, which have more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sarqc import legacy
from sarqc.checkpoint.files import file_in, read_json, write_text
from sarqc.errors import CheckpointError
from sarqc.report import model_card, page
from sarqc.report.schema import check

REPORT, PAGE = "report.json", "report.html"


def write(folder: Path, report: dict[str, Any]) -> bool:
    """Write report.json, report.html and the model card README.md into `folder`.

    A model card that somebody edited is left as it is; returns whether the card is current.
    """
    write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
    write_text(folder / PAGE, page.page(report))
    ours = not model_card.edited(folder)
    if ours:
        write_text(folder / model_card.CARD, model_card.card(report))
    return ours


def rebuild(folder: Path) -> Path:
    """Make report.html in `folder` again from its report.json, and say where it is.

    Raises `CheckpointError` where there is no report.json that can be read.
    """
    write_text(folder / PAGE, page.page(load(folder)))
    return folder / PAGE


def read(folder: Path) -> dict[str, Any] | None:
    """The report in `folder`, or None where there is none that is whole."""
    try:
        path = file_in(folder, REPORT)
        return None if path is None else legacy.report(read_json(path))
    except CheckpointError:
        return None


def load(folder: Path) -> dict[str, Any]:
    """The report in `folder`, with everything in it that is shown; `CheckpointError` saying what is missing."""
    content = read(folder)
    if content is None:
        raise CheckpointError(
            f"{folder / REPORT} is not there or is not JSON: give a folder that `sarqc quantize` wrote"
        )
    check(content, str(folder / REPORT))
    return content


def whole(folder: Path) -> dict[str, Any] | None:
    """As `load`, but None where there is no report that can be shown."""
    try:
        return load(folder)
    except CheckpointError:
        return None

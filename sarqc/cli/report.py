"""`sarqc report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sarqc.cli.options import JsonOption, print_json, print_line, stdout


def report(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that `sarqc quantize` wrote.")],
    as_json: JsonOption = False,
) -> None:
    """Rebuild report.html of a checkpoint from its report.json, and print the summary of the run."""
    from sarqc.report import report as reports
    from sarqc.report.summary import verdict

    page = reports.rebuild(checkpoint)
    result = verdict(reports.load(checkpoint))
    if as_json:
        print_json({"page": str(page), "good": result.good, "verdict": result.sentence, "concerns": result.concerns})
        return
    for line in (result.sentence, *(f"- {concern}" for concern in result.concerns), str(page)):
        print_line(stdout(), line)

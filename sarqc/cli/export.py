"""`sarqc export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sarqc.cli.options import FormatOption, JsonOption, OverwriteOption, print_json, stdout


def export(
    work: Annotated[Path, typer.Argument(help="Work folder that `sarqc quantize --keep-work` left.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist yet.")],
    format: FormatOption = "compressed-tensors",
    model: Annotated[Path | None, typer.Option(help="Folder of the original model, if it has moved.")] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the checkpoint of a finished run again, in any format; no calibration is needed."""
    from sarqc.pipeline.write import export as run

    result = run(work, output, format=format, model=model, overwrite=overwrite)
    if as_json:
        print_json({"out": str(result.out)} | result.report)
        return
    from sarqc.cli.summary import run_summary

    stdout().print(run_summary(result.out, result.report))

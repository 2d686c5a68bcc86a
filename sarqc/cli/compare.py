"""`sarqc compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sarqc.cli.flags import ConfigOption, with_options
from sarqc.cli.options import JsonOption, ModelArgument, loading, print_json, stderr, stdout
from sarqc.config_compare import COMPARE


@with_options(*COMPARE)
def compare(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the table, the plots and finished cells.")],
    given: dict[str, Any],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Methods x bits x calibration sizes on one model: a table and a page with plots.

    Every cell is quantized as `sarqc quantize` does it and evaluated block by block; no checkpoint is written.

    Rerun the command to resume or to add methods: finished cells are not measured twice.

    Example: sarqc compare smollm2 -o table --methods rtn,gptq,sarqc-gptq --bits 4,3 --seeds 0,1,2
    """
    from sarqc.cli.terminal import RunProgress

    with loading():
        from sarqc.entrypoints.compare import compare as run

    with RunProgress(stderr()) as progress:
        result = run(model, output, progress=progress, **given)
    if as_json:
        print_json({"out": str(result.out)} | result.table)
        return
    from sarqc.cli.comparison import comparison_tables

    console = stdout()
    for table in comparison_tables(result.table):
        console.print(table)
    console.print(f"{result.out}/compare.html, .json, .csv, .svg", markup=False, highlight=False, soft_wrap=True)

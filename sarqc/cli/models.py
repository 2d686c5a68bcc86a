"""`sarqc models`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sarqc.cli.options import JsonOption, print_json, print_line, stdout


def models(
    word: Annotated[str, typer.Argument(help="Part of a name, or a model's folder or hub id; by default all.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Which model classes are quantized, which of their layers, and what loads the result, by tests on tiny models."""
    from sarqc.entrypoints.models import models as run

    support = run(word)
    if as_json:
        print_json(support)
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("model", "result", "share", "layers", "transformers", "with sarqc"):
        table.add_column(title, overflow="fold", header_style="dim")
    for row in support["rows"]:
        share = f"{row['share']:.1%}" if "share" in row else ""
        table.add_row(row["name"], row["result"], share, _layers(row), row["transformers"], row["sarqc"])
    stdout().print(table)
    rows = support["rows"]
    if len(rows) <= 3:
        for line in (f"{row['name']}: {row['reason']}" for row in rows if row["reason"]):
            print_line(stdout(), line)


def _layers(row: dict[str, Any]) -> str:
    """The modules that hold the quantized layers of a block, each once."""
    parents = (layer.rpartition(".")[0] or layer for layer in row["layers"])
    return ", ".join(dict.fromkeys(parent.removesuffix(".*") for parent in parents))

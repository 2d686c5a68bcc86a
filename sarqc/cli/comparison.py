"""A comparison as tables for a terminal, one for each text that was judged on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sarqc.comparison.table import numbers
from sarqc.report.summary import figure

_HEADINGS = ("format", "sequences", "method", "perplexity", "", "agrees", "KL", "solve s")


def comparison_tables(comparison: dict[str, Any]) -> Iterator[Table]:
    """A line for each method, the best bold, ties with the best marked; what the unquantized model has below."""
    protocol = comparison["protocol"]
    several = any(row["seeds"] > 1 for row in comparison["rows"])
    note = "≈: no further from the best than that distance varies over seeds" if several else "one seed: no spread"
    for text in protocol["texts"]:
        table = Table(
            title=escape(f"{protocol['model']} on {text['text']}"),
            caption=escape(f"unquantized: {figure(text['perplexity'])}. {note}"),
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title_justify="left",
            caption_justify="left",
        )
        for heading in _HEADINGS:
            # Where a terminal is too narrow, names of methods go on in the next line, and no number is cut.
            table.add_column(
                heading,
                no_wrap=heading != "method",
                overflow="fold",
                justify="left" if heading in {"format", "method", ""} else "right",
            )
        _fill(table, [row for row in comparison["rows"] if row["text"] == text["text"]])
        yield table


def _fill(table: Table, rows: list[dict[str, Any]]) -> None:
    before = None
    for row in rows:
        case = (row["bits"], row["group_size"], row["windows"])
        shown = ["", ""]
        if case != before:
            if before is not None:
                table.add_section()
            shown = [f"W{case[0]} g{case[1]}", "" if case[2] is None else str(case[2])]
        before = case
        table.add_row(*map(Text, [*shown, row["method"], *numbers(row)]), style="bold" if row["best"] else None)

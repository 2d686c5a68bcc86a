"""A comparison as a table and a plot: means over seeds, their spread, and ties where a difference is inside it.

Methods are compared seed by seed, because two methods on the same windows share those windows' luck. The distance of
two methods is the mean over seeds of the difference of log perplexities; it spreads as far as one seed's difference
lies from that mean. A method whose distance from the best one is not larger than its spread is tied with it. One seed
has no spread, so it makes no ties.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from sarqc.report.summary import figure, text_name
from sarqc.report.svg import Axes, Ranked, Series, line_chart, ranked_chart, sheet, short

PROTOCOL = 1
"""Raised whenever cells measured before must not stand beside new ones."""
IDENTITY = ("method", "bits", "group_size", "windows", "seed")
"""What tells one cell from another, and from a checkpoint of another tool."""
METRICS = ("perplexity", "agreement", "kl")
_CSV = (*IDENTITY, "text", *METRICS, "error", "seconds")

Row = dict[str, Any]


def table(protocol: dict[str, Any], cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What compare.json holds: protocol, rows (a method at bits, group size, windows, for each text) and cells."""
    sizes = sorted({cell["windows"] for cell in cells if cell["windows"] is not None})
    rows: list[Row] = []
    for text in (entry["text"] for entry in protocol["texts"]):
        for bits, group_size in sorted({(c["bits"], c["group_size"]) for c in cells}, reverse=True):
            here = [c for c in cells if (c["bits"], c["group_size"]) == (bits, group_size)]
            for windows in sizes or [None]:
                group = [c for c in here if c["windows"] in {windows, None}]
                rows += _group(text, windows, group)
    return {"protocol": protocol, "rows": rows, "cells": list(cells)}


def as_csv(comparison: dict[str, Any]) -> str:
    """A line for each cell and text."""
    lines = io.StringIO()
    out = csv.writer(lines, lineterminator="\n")
    out.writerow(_CSV)
    for entry in comparison["protocol"]["texts"]:
        out.writerow(["unquantized", "", "", "", "", entry["text"], entry["perplexity"], 1.0, 0.0, "", ""])
    for cell in comparison["cells"]:
        for text, quality in cell["quality"].items():
            what = [cell[key] for key in IDENTITY]
            out.writerow([*what, text, *(quality[m] for m in METRICS), cell["error"], cell["seconds"]["total"]])
    return lines.getvalue()


def perplexity(row: Row) -> str:
    """A cell of a table: mean ± spread, bold where best, with a mark where tied with the best."""
    shown = with_spread(row)
    return f"**{shown}**" if row["best"] else f"{shown} ≈" if row["tied"] else shown


def with_spread(row: Row) -> str:
    """Mean ± spread, as far as there are any."""
    return "not finite" if row["perplexity"] is None else figure(row["perplexity"], row["spread"])


def numbers(row: Row, *, tied: str = "≈") -> list[str]:
    """The numbers of a row as text: perplexity, whether it is best or `tied` with the best, agreement, KL, seconds."""
    seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
    if row["perplexity"] is None:
        return [with_spread(row), "", "", "", seconds]
    mark = "best" if row["best"] else tied if row["tied"] else ""
    return [with_spread(row), mark, f"{row['agreement']:.1%}", f"{row['kl']:.4f}", seconds]


def plots(comparison: dict[str, Any], text: str) -> list[str]:
    """A chart of one text for each width: perplexity over calibration size, a line for each method; or the methods
    below each other, where there is one size."""
    rows = [row for row in comparison["rows"] if row["text"] == text]
    plain = next(entry["perplexity"] for entry in comparison["protocol"]["texts"] if entry["text"] == text)
    several = len({row["windows"] for row in rows}) > 1
    charts = []
    for bits, group_size in dict.fromkeys((row["bits"], row["group_size"]) for row in rows):
        own = [row for row in rows if (row["bits"], row["group_size"]) == (bits, group_size)]
        groups = "one scale a row" if group_size == -1 else f"groups of {group_size}"
        title = f"{text_name(text)}, {bits} bits, {groups}"
        charts.append(_by_size(own, plain, title) if several else _by_method(own, plain, title))
    return [chart for chart in charts if chart]


def plot(comparison: dict[str, Any]) -> str:
    """The charts of all texts as one drawing, a row for each text."""
    drawn = [plots(comparison, entry["text"]) for entry in comparison["protocol"]["texts"]]
    charts = [chart for row in drawn for chart in row]
    return sheet(charts, columns=max(map(len, drawn))) if charts else ""


def _by_size(rows: Sequence[Row], plain: float, title: str) -> str:
    methods = dict.fromkeys(row["method"] for row in rows)
    return line_chart(
        [_series(method, [row for row in rows if row["method"] == method]) for method in methods],
        Axes(
            "calibration sequences",
            "perplexity",
            kind="log",
            x_kind="log",
            x_ticks=sorted({row["windows"] or 1 for row in rows}),
        ),
        mark=(plain, "unquantized"),
        title=title,
    )


def _by_method(rows: Sequence[Row], plain: float, title: str) -> str:
    shown = [row for row in rows if row["perplexity"] is not None]
    ranked = [
        Ranked(
            row["method"],
            row["perplexity"],
            with_spread(row),
            (row["lowest"], row["highest"]) if row["seeds"] > 1 else None,
            row["best"],
        )
        for row in shown
    ]
    return ranked_chart(ranked, "perplexity", mark=(plain, "unquantized"), title=title)


def _series(method: str, rows: Sequence[Row]) -> Series:
    shown = [row for row in rows if row["perplexity"] is not None]
    points = tuple(
        (float(row["windows"] or 1), row["perplexity"], f"{method}, {row['windows']}: {short(row['perplexity'])}")
        for row in shown
    )
    spans = tuple((float(row["windows"] or 1), row["lowest"], row["highest"]) for row in shown if row["seeds"] > 1)
    return Series(method, points, spans)


def _group(text: str, windows: int | None, cells: Sequence[dict[str, Any]]) -> list[Row]:
    """One row for each method among cells that differ in method and seed alone."""
    methods = dict.fromkeys(cell["method"] for cell in cells)
    rows = {}
    for method in methods:
        own = {cell["seed"]: cell for cell in cells if cell["method"] == method}
        rows[method] = _row(text, windows, own)
    finite = {method: row for method, row in rows.items() if row["perplexity"] is not None}
    best = min(finite, key=lambda method: finite[method]["perplexity"], default=None)
    for method, row in finite.items():
        assert best is not None
        row["best"] = method == best
        row["tied"] = method != best and _tied(rows[best]["by_seed"], row["by_seed"])
    return list(rows.values())


def _row(text: str, windows: int | None, cells: dict[int | None, dict[str, Any]]) -> Row:
    first = next(iter(cells.values()))
    by_seed = {str(seed): cell["quality"].get(text) for seed, cell in cells.items()}
    qualities = [quality for quality in by_seed.values() if quality is not None]
    whole = len(qualities) == len(by_seed)
    spent = [cell["seconds"]["solve"] for cell in cells.values()]
    values = [quality["perplexity"] for quality in qualities]
    mean = sum(values) / len(values) if whole else None
    return {
        "text": text,
        "bits": first["bits"],
        "group_size": first["group_size"],
        "windows": windows,
        "method": first["method"],
        "seeds": len(cells),
        "perplexity": mean,
        "spread": max(abs(v - mean) for v in values) if mean is not None and len(values) > 1 else None,
        "lowest": min(values, default=None),
        "highest": max(values, default=None),
        "agreement": sum(q["agreement"] for q in qualities) / len(qualities) if whole else None,
        "kl": sum(q["kl"] for q in qualities) / len(qualities) if whole else None,
        "seconds": None if None in spent else sum(spent) / len(spent),
        "by_seed": {seed: None if quality is None else quality["perplexity"] for seed, quality in by_seed.items()},
        "best": False,
        "tied": False,
    }


def _tied(best: dict[str, float], other: dict[str, float]) -> bool:
    """Whether two methods differ by no more than their difference varies over seeds."""
    # A method that reads no text is the same for every seed; of others only seeds that both have can be compared.
    known = [set(values) for values in (best, other) if "None" not in values]
    seeds = sorted(set.intersection(*known)) if known else []
    if len(seeds) < 2:
        return False
    one, two = (
        [math.log(values["None"] if "None" in values else values[seed]) for seed in seeds] for values in (best, other)
    )
    gaps = [b - a for a, b in zip(one, two)]
    mean = sum(gaps) / len(gaps)
    return abs(mean) <= max(abs(gap - mean) for gap in gaps)

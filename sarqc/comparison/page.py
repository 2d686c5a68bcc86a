"""A comparison in files: compare.json, compare.csv, compare.svg, and compare.html, which shows all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sarqc.checkpoint.files import write_text
from sarqc.comparison.table import as_csv, numbers, plot, plots
from sarqc.report.markup import document, figures, headline, section, table
from sarqc.report.summary import figure, text_name

_HEAD = ("method", "format", "sequences", "perplexity", "", "next token agrees", "KL, nats", "solving, s")


def write(folder: Path, comparison: dict[str, Any]) -> None:
    """All four in `folder`."""
    write_text(folder / "compare.json", json.dumps(comparison, indent=1, allow_nan=False) + "\n")
    write_text(folder / "compare.csv", as_csv(comparison))
    write_text(folder / "compare.svg", plot(comparison))
    write_text(folder / "compare.html", page(comparison))


def page(comparison: dict[str, Any]) -> str:
    """The page of a comparison."""
    protocol = comparison["protocol"]
    name = str(protocol["model"]).rstrip("/").rpartition("/")[2] or str(protocol["model"])
    sections = [_text(comparison, entry) for entry in protocol["texts"]]
    header = headline(f"{name}: methods compared", _verdict(comparison), good=True)
    return document(f"{name}, methods compared · sarqc", header, [*sections, _protocol(protocol)])


def _verdict(comparison: dict[str, Any]) -> str:
    """The best method of each width on the first text."""
    entry = comparison["protocol"]["texts"][0]
    best = [row for row in comparison["rows"] if row["best"] and row["text"] == entry["text"]]
    last = {(row["bits"], row["group_size"]): row for row in best}  # with most sequences
    parts = [f"{row['method']} {figure(row['perplexity'])} at {row['bits']} bits" for row in last.values()]
    plain = f"unquantized {figure(entry['perplexity'])}"
    if not parts:
        return f"Perplexity on {text_name(entry['text'])}: {plain}; no method is measured yet."
    return f"Lowest perplexity on {text_name(entry['text'])}: {', '.join(parts)}; {plain}."


def _text(comparison: dict[str, Any], entry: dict[str, Any]) -> str:
    rows = [row for row in comparison["rows"] if row["text"] == entry["text"]]
    lines = [
        (
            row["method"],
            f"{row['bits']} bits, " + ("rows" if row["group_size"] == -1 else f"groups of {row['group_size']}"),
            "" if row["windows"] is None else str(row["windows"]),
            *numbers(row, tied="≈ best"),
        )
        for row in rows
    ]
    caption = (
        f"Perplexity of the unquantized model: {figure(entry['perplexity'])}, on {entry['windows']} sequences of "
        f"{entry['seqlen']} tokens."
    )
    if any(row["seeds"] > 1 for row in rows):
        caption += " ≈: no further from the best than that distance varies over seeds."
    best = [row["best"] for row in rows]
    shown = (figures(*plots(comparison, entry["text"])), table(_HEAD, lines, numbers=5, best=best))
    return section(text_name(entry["text"]), caption, *shown)


def _protocol(protocol: dict[str, Any]) -> str:
    calibration = protocol["calibration"]
    rows = [
        ("model", str(protocol["model"])),
        ("measured", protocol["mode"]),
        ("calibration", f"{text_name(calibration['text'])}, sequences of {calibration['seqlen']} tokens"),
        ("computed on", f"{protocol['device']} in {protocol['dtype']}"),
        *((name, str(version)) for name, version in protocol["versions"].items()),
    ]
    return section("How it was measured", "The same windows, code and dtype for all methods.", table(("", ""), rows))

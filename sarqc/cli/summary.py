"""A finished run and a checkpoint as small tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from sarqc.cli.options import facts


def run_summary(out: Path, report: dict[str, Any]) -> Table:
    """What a run did, in a dozen lines."""
    from sarqc.report.summary import serves, verdict

    table = facts("quantized")
    table.add_row("checkpoint", escape(str(out)))
    for row in _report_rows(report):
        table.add_row(*row)
    for concern in verdict(report).concerns:
        table.add_row("look closer", escape(concern))
    serve = f"    vllm serve {out}" if serves(report, "vLLM") else ""
    table.add_row("next", escape(f"sarqc eval {out}    sarqc chat {out}{serve}"))
    return table


def checkpoint_summary(contents: dict[str, Any]) -> Table:
    """What `inspect` found."""
    from sarqc.report.summary import counted, human

    table = facts("checkpoint")
    table.add_row("folder", escape(contents["folder"]))
    table.add_row("format", contents["format"])
    table.add_row(
        "tensors", f"{contents['tensors']} in {counted(contents['shards'], 'file')}, {human(contents['bytes'])}"
    )
    table.add_row(
        "quantized", f"{contents['quantized_linears']} Linears, {contents['bits_per_weight']:.3f} bits per weight"
    )
    if contents["report"] is None:
        table.add_row("run", "no report.json: not written by sarqc, or removed")
        return table
    try:
        rows = list(_report_rows(contents["report"]))
    except (KeyError, TypeError, ValueError, AttributeError):  # the file may have been edited
        rows = [("run", "report.json does not hold what sarqc writes there")]
    for row in rows:
        table.add_row(*row)
    return table


def _report_rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Label and text of each line about a run."""
    from sarqc.report.summary import human, settings, share, width

    quant, method, size = report["quant"], report["method"], report["size"]
    kind = "symmetric" if quant["sym"] else "asymmetric"
    group = "one scale a row" if quant["group_size"] == -1 else f"groups of {quant['group_size']}"
    yield "weights", escape(f"{width(quant)}, {group}, {kind}; {size['bits_per_weight']} bits with scales")
    if "widths" in report:
        counted: dict[int, int] = {}
        for unit in report["widths"]["units"]:
            counted[unit["bits"]] = counted.get(unit["bits"], 0) + unit["weights"]
        total = max(sum(counted.values()), 1)
        yield "widths", ", ".join(f"{bits} bits: {counted[bits] / total:.0%}" for bits in sorted(counted))
    yield "size", human(size["bytes"])
    calibration = report["calibration"]
    how = "no calibration"
    if calibration:
        how = f"{calibration['windows']} sequences of {calibration['seqlen']} tokens of {calibration['text']}"
    yield "method", escape(f"{method['method']}{settings(report)}; {how}")
    measured = "output error" if calibration else "weight error"
    yield measured, f"{share(report['error'])} (RTN {share(report['rtn_error'])})"
    for site, reason in report["fallbacks"].items():
        yield "fallback", escape(f"{site}: {reason}")
    memory = ", ".join(f"{name} {human(mib * 2**20)}" for name, mib in report["peak_memory_mib"].items())
    yield "cost", escape(f"{report['seconds']['total']:.0f} s, peak memory {memory}")

"""The committed table: one line for each kernel and card, in an order that does not change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.aot.compiler import Built
from benchmarks.aot.sass import TENSOR_CORE

RESULTS = Path(__file__).parents[1] / "results"
HEAD = "| kernel | card | warps | registers | stack B | shared B | tensor core | other | problems |"
RULE = "| --- | --- | ---: | ---: | ---: | ---: | --- | --- | --- |"


def render(title: str, lines: Sequence[Built]) -> str:
    """The Markdown of a table."""
    bad = sum(bool(line.problems) for line in lines)
    summary = f"{len(lines)} kernels, {bad} with problems. Made by `make aot`; compiled for cards that were not there."
    rows = sorted(lines, key=lambda line: (line.name, len(line.arch), line.arch))
    return "\n".join([f"# {title}", "", summary, "", HEAD, RULE, *map(_row, rows), ""])


def write(name: str, text: str) -> Path:
    """Save a table under benchmarks/results and return its path."""
    path = RESULTS / name
    path.write_text(text)
    return path


def _row(line: Built) -> str:
    def counts(wanted: bool) -> str:
        found = {op: count for op, count in sorted(line.opcodes.items()) if (op in TENSOR_CORE) == wanted and count}
        return ", ".join(f"{count} {op}" for op, count in found.items()) or "-"

    numbers = f"{line.warps or '-'} | {line.registers} | {line.stack} | {line.shared}"
    problems = "; ".join(line.problems).replace("|", "/") or "-"
    return f"| {line.name} | {line.arch} | {numbers} | {counts(True)} | {counts(False)} | {problems} |"

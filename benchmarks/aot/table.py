"""The committed table: one line for each kernel and card, in an order that does not change.

A run for some cards and operations replaces their lines; others stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.aot.sass import TENSOR_CORE

RESULTS = Path(__file__).parents[1] / "results"
HEAD = "| kernel | card | warps | registers | stack B | shared B | tensor core | other | problems |"
RULE = "| --- | --- | ---: | ---: | ---: | ---: | --- | --- | --- |"


class Built(NamedTuple):
    """One line of the table. shared: bytes of one program. problems: what must not be; empty is good."""

    name: str
    arch: str
    warps: int
    registers: int
    stack: int
    shared: int
    opcodes: dict[str, int]
    problems: tuple[str, ...]


def render(title: str, lines: Sequence[Built], before: str = "") -> str:
    """The Markdown of a table. before: what it was; lines of cards and operations (the first word of a name)
    that are not among the new ones are kept."""
    rows = {(line.name, line.arch): _row(line) for line in lines}
    done = {(line.name.split()[0], line.arch) for line in lines}
    for row in before.splitlines():
        cells = row.split(" | ")
        if (
            len(cells) > 2
            and row.startswith("| ")
            and row not in (HEAD, RULE)
            and (cells[0].split()[1], cells[1]) not in done
        ):
            rows[cells[0].removeprefix("| "), cells[1]] = row
    ordered = [rows[key] for key in sorted(rows, key=lambda key: (key[0], len(key[1]), key[1]))]
    bad = sum(not row.endswith(" | - |") for row in ordered)
    cards = ", ".join(sorted({card for _, card in rows}, key=lambda card: (len(card), card)))
    summary = f"{len(rows)} kernels for {cards}, {bad} with problems. Made by `make aot`; no card was there."
    return "\n".join([f"# {title}", "", summary, "", HEAD, RULE, *ordered, ""])


def write(name: str, title: str, lines: Sequence[Built]) -> Path:
    """Save a table under benchmarks/results and return its path."""
    path = RESULTS / name
    path.write_text(render(title, lines, path.read_text() if path.exists() else ""))
    return path


def _row(line: Built) -> str:
    def counts(wanted: bool) -> str:
        counted = {op: count for op, count in sorted(line.opcodes.items()) if (op in TENSOR_CORE) == wanted and count}
        return ", ".join(f"{count} {op}" for op, count in counted.items()) or "-"

    numbers = f"{line.warps or '-'} | {line.registers} | {line.stack} | {line.shared}"
    problems = "; ".join(line.problems).replace("|", "/") or "-"
    return f"| {line.name} | {line.arch} | {numbers} | {counts(True)} | {counts(False)} | {problems} |"

"""docs/models.md, written from the results of the sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.models.rows import CONDITIONS, FIRST

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def write(results: dict[str, Any], page: Path = PAGE) -> None:
    """Write the page."""
    page.write_text(text(results))


def text(results: dict[str, Any]) -> str:
    """The page as Markdown."""
    rows: dict[str, dict[str, Any]] = results["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    first = [row for row in (*FIRST, *CONDITIONS) if row in rows]
    others = [row for row in rows if row not in first]
    parts = [
        "# Supported models",
        "SARQC has no table of architectures. It quantizes what transformers builds as a decoder with Linear layers "
        "or experts. Each row is a tiny random model of the class, saved as people save it, quantized to 4 bits and "
        "loaded again. No published weights are part of this test.",
        f"Versions: {versions}. Run `make models` to repeat it.",
        "*same*: the logits are those of a dense model that compressed-tensors unpacked. *share*: quantized weights of "
        "the decoder blocks; routers and matrices that stay in fp32 are not counted. `+vl` is a multimodal wrapper, "
        "`@` a condition of published checkpoints.",
        "## Most used models and published conditions",
        _table(first, rows),
    ]
    if others:
        parts += ["## All other architectures", _table(others, rows)]
    if refused := [row for row in (*first, *others) if rows[row].get("error")]:
        parts += ["## Reasons", "\n".join(f"- `{row}`: {rows[row]['error']}" for row in refused)]
    return "\n\n".join(parts) + "\n"


def _table(names: list[str], rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| model | result | share | transformers | with sarqc |", "|---|---|---|---|---|"]
    for name in names:
        row = rows[name]
        share = f"{row['share']:.1%}" if "share" in row else ""
        lines.append(f"| {name} | {row['kind']} | {share} | {_same(row, 'transformers')} | {_same(row, 'sarqc')} |")
    return "\n".join(lines)


def _same(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return ""
    return "same" if row[key]["same"] else "does not load" if "error" in row[key] else "differs"

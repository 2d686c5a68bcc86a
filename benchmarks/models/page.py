"""docs/models.md and sarqc/models.json, written from the results of the sweep."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.models.rows import CONDITIONS, FIRST

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
PACKAGED = ROOT / "sarqc" / "models.json"


def write(results: dict[str, Any]) -> None:
    """Write the page, and what `sarqc models` prints."""
    PAGE.write_text(text(results))
    PACKAGED.write_text(packaged(results))


def packaged(results: dict[str, Any]) -> str:
    """What `sarqc models` prints, one row a line."""
    rows = ",\n".join(json.dumps(_row(name, results["rows"][name])) for name in _ordered(results["rows"]))
    return f'{{"versions": {json.dumps(results["versions"])}, "rows": [\n{rows}\n]}}\n'


def _row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    short = {"name": name, "class": row.get("class", ""), "result": row["kind"], "layers": row.get("layers", [])}
    runtimes = {key: _same(row, key) for key in ("transformers", "sarqc")}
    share = {"share": row["share"]} if "share" in row else {}
    return short | share | runtimes | {"left": row.get("left", {}), "reason": row.get("error") or ""}


def _ordered(rows: dict[str, Any]) -> list[str]:
    """The most used ones first, then the conditions, then all others by name."""
    first = [row for row in dict.fromkeys((*FIRST, *CONDITIONS)) if row in rows]
    return first + sorted(row for row in rows if row not in first)


def text(results: dict[str, Any]) -> str:
    """The page as Markdown."""
    rows: dict[str, dict[str, Any]] = results["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    first = [row for row in (*FIRST, *CONDITIONS) if row in rows]
    others = _ordered(rows)[len(first) :]
    parts = [
        "# Supported models",
        "SARQC has no table of architectures. It quantizes what transformers builds as a decoder with Linear layers "
        "or experts. Each row is a tiny random model of the class, saved as people save it, quantized to 4 bits and "
        "loaded again. No published weights are part of this test.",
        f"Versions: {versions}. Run `make models` to repeat it.{_needed(rows)}",
        "*same*: the logits are those of a dense model that compressed-tensors unpacked. *share*: quantized weights of "
        "the decoder blocks; routers, matrices that stay in fp32 and layers that text does not pass through are not "
        "counted. `+vl` is a multimodal wrapper, `@` a condition of published checkpoints. "
        "*dry run*: whether `--dry-run` says the same refusal, layers, reasons and servers, with the headers of the "
        "weights and with config.json alone.",
        "## Most used models and published conditions",
        _table(first, rows),
    ]
    if others:
        parts += ["## All other architectures", _table(others, rows)]
    if refused := [row for row in (*first, *others) if rows[row].get("error")]:
        parts += ["## Reasons", "\n".join(f"- `{row}`: {rows[row]['error']}" for row in refused)]
    known = [(why, [f"`{row}`" for row in names if row in rows]) for names, why in _NOT_TAKEN.items()]
    if any(names for _, names in known):
        parts += [
            "## What is not taken yet",
            "\n".join(f"- {', '.join(names)}: {why}" for why, names in known if names),
        ]
    if apart := [row for row in (*first, *others) if _unforeseen(rows[row])]:
        lines = (f"- `{row}`, {how}: {said}" for row in apart for how, said in _unforeseen(rows[row]).items())
        parts += [
            "## Dry runs that differ",
            "A dry run computes nothing, and of a folder without weights it knows what transformers would save.",
            "\n".join(lines),
        ]
    if alone := [row for row in (*first, *others) if rows[row]["kind"].startswith("reload in transformers fails")]:
        parts += [
            "## Not loaded by transformers alone",
            "These load with `import sarqc`. The causes are in transformers. Where it finds no tensors for a "
            "parameter, it leaves that parameter random and warns.",
            "\n".join(f"- {why}: {', '.join(names)}" for why, names in _causes(alone, rows).items()),
        ]
    return "\n\n".join(parts) + "\n"


_NOT_TAKEN = {
    ("dbrx", "jetmoe", "inkling_text", "inkling_mm_model+vl", "xlnet", "recurrent_gemma"): "matrices that are "
    "parameters of a module which is neither a Linear nor declared experts, so there is no layer to pack them in.",
    ("deepseek_v4",): "`wo_a` is block-diagonal: each of its parts multiplies inputs of its own, so it has a "
    "Hessian for each part. It is left in 16 bits.",
    ("longcat_flash",): "its experts hold matrices for identity experts too, in one of two parameters, and pass tokens "
    "by them in code of their own.",
    ("zamba", "zamba2"): "one transformer block stands in several places. Blocks are solved one by one, so what "
    "several of them share stays in 16 bits.",
    ("inkling2_loop_text",): "its experts are in one tensor, and transformers has no names for single ones of "
    "this class.",
    ("xlstm",): "runs in fp32 alone. In bf16 its own code mixes dtypes, and the run is refused before anything is "
    "written, with `--dtype float32` as the way out.",
    ("llama@bin",): "pickle files can run code, so they are refused on purpose. `save_pretrained` in transformers "
    "writes safetensors, which are taken.",
    ("gemma3_text@vlprefix",): "transformers does not find tensors by these names either, and would leave the model "
    "random. Rename them.",
}
"""Why rows are refused or quantized in part, where the message does not say it."""

_KNOWN = {
    r"experts\.\w+$": "it reads all experts of this class from one tensor, and has no rule for single ones",
    r"c_(attn|fc|proj)\.weight$": "its layers are of `Conv1D`, of which compressed-tensors knows no packed form",
    r"CONVERSION": "its expansion of compressed-tensors, which runs before the class's own conversions, drops what is "
    "stored dense (convolutions, layers left alone)",
    r"^ValueError: source keys=": "it cuts no tensor into several where compressed-tensors is read "
    "(here one of a tower)",
    r"ignore_mismatched_sizes": "it joins `weight_shape` of two packed layers as it joins their weights",
    r"has no attribute 'weight'": "it initialises `weight` of a packed layer, which has none",
}
"""Causes, by what transformers says or misses; each was traced in its code (5.23.0, 5.24.0)."""


def _causes(names: list[str], rows: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Rows by the cause that transformers does not load them."""
    by_cause: dict[str, list[str]] = {}
    for name in names:
        reload = rows[name]["transformers"]
        message = reload.get("error") or (
            reload["missing"][0] if reload["missing"] else f"logits: {reload['difference']}"
        )
        by_cause.setdefault(
            next((why for sign, why in _KNOWN.items() if re.search(sign, message)), message), []
        ).append(name)
    return {why: [f"`{name}`" for name in alike] for why, alike in by_cause.items()}


def _table(names: list[str], rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| model | result | share | transformers | with sarqc | dry run |", "|---|---|---|---|---|---|"]
    for name in names:
        row = rows[name]
        share = f"{row['share']:.1%}" if "share" in row else ""
        reloads = f"{_same(row, 'transformers')} | {_same(row, 'sarqc')}"
        said = "differs" if _unforeseen(row) else "same" if "dry_run" in row else ""
        lines.append(f"| {name} | {row['kind']} | {share} | {reloads} | {said} |")
    return "\n".join(lines)


def _needed(rows: dict[str, dict[str, Any]]) -> str:
    """A sentence on rows that were built with packages which this project does not install."""
    names = [f"`{name}` ({', '.join(row['with'])})" for name, row in rows.items() if "with" in row]
    packages = {" ".join(item): None for row in rows.values() for item in row.get("with", {}).items()}
    return f" With {', '.join(packages)} beside them: {', '.join(names)}." if names else ""


def _unforeseen(row: dict[str, Any]) -> dict[str, str]:
    """What dry runs say otherwise than the run did, by what they had of the model."""
    return {reading: said for reading, said in row.get("dry_run", {}).items() if said != "same"}


def _same(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return ""
    return "same" if row[key]["same"] else "does not load" if "error" in row[key] else "differs"

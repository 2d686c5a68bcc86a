"""Perplexity of methods side by side on the same tokens: the table in the README.

    python -m benchmarks.quality.table MODEL CALIBRATION.txt EVALUATION.txt results.json \
        --case 4:16 --case 3:4 --case 3:16 --case 3:64 [--method ...] [--also ...]

Runs that results.json holds already stay in it unless they are made again, so a table can grow method by method. A case
is BITS:WINDOWS; every method calibrates on the first so many windows of 512 tokens and is judged on the last 4
windows of 2048 tokens of the other text. --also judges a checkpoint that another tool wrote, by the same code; it is
given as BITS:WINDOWS:NAME=FOLDER.
Prints Markdown; what it is made from goes to results.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import sarqc
from benchmarks.quality.tokens import first_windows
from sarqc.job.reporting.report import versions

METHODS = ("rtn", "awq", "gptq", "sarqc", "sarqc-gptq")


def judge(model: str | Path, text: str) -> float:
    """Perplexity over the last 4 windows of 2048 tokens, in the same arithmetic for whoever made the checkpoint."""
    return sarqc.evaluate(model, text=text, seqlen=2048, max_windows=4, packed=False).perplexity


def run_case(args: argparse.Namespace, bits: int, windows: int, method: str) -> dict[str, Any]:
    """Quantize and judge once."""
    tokens = first_windows(args.model, args.calibration, windows, 512)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        report = sarqc.quantize(
            args.model, out, method=method, bits=bits, group_size=args.group_size, calib=tokens, num_samples=windows
        ).report
        return {
            "bits": bits,
            "windows": windows,
            "method": method,
            "perplexity": judge(out, args.evaluation),
            "output_error": report["error"],
            "seconds": report["seconds"],
            "versions": report["versions"],
        }


def markdown(results: dict[str, Any]) -> str:
    """The table: a row a case, a column a method."""
    cases = sorted({(r["bits"], r["windows"]) for r in results["runs"]}, reverse=True)
    found_names = dict.fromkeys(r["method"] for r in results["runs"])
    names = sorted(found_names, key=lambda name: METHODS.index(name) if name in METHODS else len(METHODS))
    lines = ["| bits | windows | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for bits, windows in cases:
        found = {r["method"]: r["perplexity"] for r in results["runs"] if (r["bits"], r["windows"]) == (bits, windows)}
        best = min(found.values())
        cells = [_cell(found.get(name), best) for name in names]
        lines.append(f"| {bits} | {windows} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, best: float) -> str:
    if value is None:
        return ""
    return f"**{value:.2f}**" if value == best else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("results", type=Path)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--case", action="append", required=True, help="BITS:WINDOWS")
    parser.add_argument("--method", action="append", default=[], help=f"default: {', '.join(METHODS)}")
    parser.add_argument("--also", action="append", default=[], help="BITS:WINDOWS:NAME=FOLDER")
    args = parser.parse_args()
    results: dict[str, Any] = {"runs": []}
    if args.results.exists():
        results = json.loads(args.results.read_text(encoding="utf-8"))
    results |= {
        "group_size": args.group_size,
        "unquantized": judge(args.model, args.evaluation),
        "versions": versions(),
    }
    print(f"unquantized: {results['unquantized']:.3f}", flush=True)
    for case in args.case:
        bits, windows = map(int, case.split(":"))
        for method in args.method or METHODS:
            done = [r for r in results["runs"] if (r["bits"], r["method"]) == (bits, "rtn")]
            # Rounding sees no text: one run serves every number of windows.
            run = done[0] | {"windows": windows} if method == "rtn" and done else run_case(args, bits, windows, method)
            _put(results, run, args.results)
    for entry in args.also:
        case, folder = entry.split("=", 1)
        bits, windows, name = case.split(":", 2)
        run = {"bits": int(bits), "windows": int(windows), "method": name}
        _put(results, run | {"perplexity": judge(folder, args.evaluation)}, args.results)
    print(f"\nunquantized: {results['unquantized']:.2f}\n\n{markdown(results)}")


def _put(results: dict[str, Any], run: dict[str, Any], path: Path) -> None:
    """Add a run in the place of an older one of its kind, and save."""

    def kind(of: dict[str, Any]) -> tuple[Any, ...]:
        return of["bits"], of["windows"], of["method"]

    results["runs"] = [known for known in results["runs"] if kind(known) != kind(run)] + [run]
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(run, flush=True)


if __name__ == "__main__":
    main()

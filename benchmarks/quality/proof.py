"""The quality table: methods x bits x calibration sizes on a real model, and what stands in the README for it.

    python -m benchmarks.quality.proof RESULTS.json                          the small setting, minutes on two cores
    python -m benchmarks.quality.proof RESULTS.json --full --model MODEL --dataset A.txt --eval A-test.txt --eval B.txt

Everything is measured by `sarqc.compare`, whose folder (--work-dir) makes it resumable: run it again.
The small setting needs no network: the packaged SmolLM2, and the topics of Python's language reference, part of them to
calibrate on and the others to judge on. --also judges checkpoints of other tools, or of whole runs of ours, by the
same code, as in `sarqc compare --also`. RESULTS.json gets rows, protocol, versions and duration, RESULTS.svg the plot.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

import sarqc
from sarqc.cli.comparison import comparison_tables
from sarqc.cli.terminal import RunProgress
from sarqc.comparison.experiment import Other
from sarqc.comparison.table import perplexity, plot, table

Setting = dict[str, Any]
"""What `sarqc.compare` is asked for."""
SMALL: tuple[Setting, ...] = (
    dict(
        methods=("rtn", "gptq", "sarqc-gptq"),
        bits=(3,),
        group_sizes=(64,),
        num_samples=(4, 16),
        seeds=(0, 1),
        eval_windows=8,
    ),
)
WHOLE = "whole runs"
"""The protocol's mode where checkpoints of whole runs were judged (`benchmarks.quality.whole`)."""
_FULL: Setting = dict(
    methods=("rtn", "awq", "sarqc-awq", "gptq", "rqc-gptq", "sarqc-gptq", "sarqc-awq-gptq"),
    num_samples=(4, 16, 64),
    seeds=(0, 1, 2),
    eval_windows=32,
)
FULL: tuple[Setting, ...] = (
    _FULL | dict(bits=(2,), group_sizes=(32,)),
    _FULL | dict(bits=(4, 3), group_sizes=(64,)),
)


def markdown(results: dict[str, Any]) -> str:
    """The README's table: what was measured how, the perplexities, and how to read them."""
    protocol = results["protocol"]
    mode = protocol["mode"].partition(":")[0]
    work = "Judging" if mode == WHOLE else "Solving and judging"
    texts = ", ".join(f"{entry['text'].rpartition('/')[2]} {entry['perplexity']:.2f}" for entry in protocol["texts"])
    seeds = max(row["seeds"] for row in results["rows"])
    return "\n".join(
        [
            f"{protocol['model'].rpartition('/')[2]}, {mode}, calibrated on "
            f"{protocol['calibration']['text'].rpartition('/')[2]} in windows of {protocol['calibration']['seqlen']} "
            f"tokens, {seeds} seeds; perplexity, mean ± largest distance of a seed from it. Unquantized: {texts}.",
            "",
            as_markdown(results),
            "",
            "**Bold**: best; ≈: tied with it, because the difference, seed by seed, varies by more than it amounts to. "
            f"{work} took {results['minutes']:.0f} minutes on {results['cpus']} CPU cores.",
        ]
    )


def as_markdown(result: dict[str, Any]) -> str:
    """Perplexities with their spread, a column for each method; the best bold, ties with it marked."""
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    lines = ["| text | bits | group | windows | " + " | ".join(methods) + " |", "|---" * (len(methods) + 4) + "|"]
    cases = dict.fromkeys((r["text"], r["bits"], r["group_size"], r["windows"]) for r in result["rows"])
    for text, bits, group_size, windows in cases:
        own = {
            row["method"]: row
            for row in result["rows"]
            if (row["text"], row["bits"], row["group_size"], row["windows"]) == (text, bits, group_size, windows)
        }
        name = text.rpartition("/")[2].replace("|", "\\|")
        cells = " | ".join(perplexity(own[method]) if method in own else "" for method in methods)
        lines.append(f"| {name} | {bits} | {group_size} | {'' if windows is None else windows} | {cells} |")
    return "\n".join(lines)


def write_results(path: Path, protocol: dict[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of these cells to `path`, and their tables to the terminal; all of it, as compare.json has it."""
    whole = table(protocol, cells)
    spent = sum(cell["seconds"]["total"] for cell in cells)
    results = {key: whole[key] for key in ("protocol", "rows")} | {
        "minutes": round(spent / 60, 1),
        "cpus": os.cpu_count(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for shown in comparison_tables(whole):
        Console().print(shown)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dataset", default="builtin")
    parser.add_argument("--eval", action="append", dest="texts")
    parser.add_argument("--methods", help="instead of the setting's, with commas between")
    parser.add_argument("--num-samples", help="instead of the setting's, with commas between")
    parser.add_argument("--also", action="append", default=[], type=Other.parsed)
    parser.add_argument("--work-dir", type=Path, default=Path("quality-output/work"))
    args = parser.parse_args()
    instead: Setting = {}
    if args.methods:
        instead["methods"] = tuple(args.methods.split(","))
    if args.num_samples:
        instead["num_samples"] = tuple(map(int, args.num_samples.split(",")))
    cells: list[dict[str, Any]] = []
    protocol: dict[str, Any] = {}
    for setting in FULL if args.full else SMALL:
        own = [other for other in args.also if other.bits in setting["bits"]]
        with RunProgress(Console(stderr=True)) as progress:
            comparison = sarqc.compare(
                args.model,
                args.work_dir,
                dataset=args.dataset,
                texts=args.texts or ["builtin"],
                also=own,
                progress=progress,
                **(setting | instead),
            )
        cells += comparison.table["cells"]
        protocol = comparison.table["protocol"]
    whole = write_results(args.results, protocol, cells)
    args.results.with_suffix(".svg").write_text(plot(whole), encoding="utf-8")


if __name__ == "__main__":
    main()

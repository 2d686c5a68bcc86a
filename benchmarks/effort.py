"""What each effort takes and what it gives: seconds in turns, perplexity and KL divergence on held-out text.

    python -m benchmarks.effort benchmarks/results/cpu-effort.json [--rounds 3] [--dataset TEXT] [--eval TEXT ...]

SmolLM2-135M, 16 sequences of 512 tokens, groups of 64. Without files, texts are Python's language reference, calibrated
on some topics and judged on the others. Every run is a process of its own; `sarqc.compare` judges the checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import sarqc
from benchmarks.speed import measure, middle
from sarqc.comparison.experiment import Other
from sarqc.config import DEFAULT_EFFORT, EFFORTS
from sarqc.system import versions

WINDOWS, SEQLEN, GROUP_SIZE = 16, 512, 64

QUANTIZE = """
import sys, sarqc
model, out, effort, bits, group_size, dataset, windows, seqlen = sys.argv[1:]
numbers = dict(bits=int(bits), group_size=int(group_size), num_samples=int(windows), seqlen=int(seqlen))
result = sarqc.quantize(model, out, effort=effort, dataset=dataset, overwrite=True, **numbers)
print(result.report["seconds"]["total"])
"""

Runs = dict[tuple[int, str], list[dict[str, float]]]
"""Figures of every run, by bits and effort."""


def run_all(args: argparse.Namespace, work: Path) -> Runs:
    """Every effort at every bit-width, in turns; the checkpoints of the last round stay in `work`."""
    runs: Runs = {}
    for _, bits, effort in product(range(args.rounds), args.bits, EFFORTS):
        numbers = [bits, GROUP_SIZE, args.dataset, WINDOWS, SEQLEN]
        inputs = [args.model, work / f"{effort}-{bits}", effort, *numbers]
        runs.setdefault((bits, effort), []).append(measure([sys.executable, "-c", QUANTIZE, *map(str, inputs)]))
        print(bits, "bits", effort, runs[bits, effort][-1], flush=True)
    return runs


def evaluate(args: argparse.Namespace, runs: Runs, work: Path) -> tuple[dict[str, Any], dict[tuple[int, str], Any]]:
    """The protocol, and by bits and effort the quality on each text."""
    others = [Other(effort, bits, GROUP_SIZE, WINDOWS, 0, work / f"{effort}-{bits}") for bits, effort in runs]
    comparison = sarqc.compare(
        args.model,
        work / "judged",
        methods=("rtn",),
        bits=tuple(args.bits),
        group_sizes=(GROUP_SIZE,),
        dataset=args.dataset,
        num_samples=(WINDOWS,),
        seqlen=SEQLEN,
        texts=args.texts or ["builtin"],
        also=others,
    )
    quality = {(cell["bits"], cell["method"]): cell["quality"] for cell in comparison.table["cells"]}
    return comparison.table["protocol"], quality


def rows(runs: Runs, quality: dict[tuple[int, str], Any]) -> list[dict[str, Any]]:
    """One for each bit-width and effort. ratios: to the default effort, round by round, the median."""
    items = []
    for (bits, effort), measured in runs.items():
        usual = runs[bits, DEFAULT_EFFORT]
        ratios = [{name: run[name] / base[name] for name in run} for run, base in zip(measured, usual)]
        figures = {"medians": middle(measured), "ratios": middle(ratios)}
        items.append({"bits": bits, "effort": effort, **figures, "quality": quality[bits, effort]})
    return items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dataset", default="builtin")
    parser.add_argument("--eval", action="append", dest="texts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = run_all(args, Path(folder))
        protocol, quality = evaluate(args, runs, Path(folder))
    threads = os.environ.get("OMP_NUM_THREADS")
    machine = {"cpus": os.cpu_count(), "threads": int(threads) if threads else None, "rounds": args.rounds}
    record = {"rows": rows(runs, quality), "protocol": protocol, **machine, "versions": versions()}
    args.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""A first run on a GPU: tests, then the points that matter, then the rest, and a last line for all that is missing.

Usage: python -m benchmarks.first_run [--minutes 9] [--out FOLDER] [--cache FOLDER] [--quick] [--device auto]

Every part is a process with its share of the time that is left. What it measured is on disk as it is made, and a part
that crashes, hangs or fails takes nothing from the others. FOLDER holds `summary.json` (rewritten after each part),
`records.jsonl` (as `benchmarks.run` writes them) and the output of each part. Needs nothing but this repository, torch,
Triton and pytest; no network. --cache is what `make gpu-cache` made: compiled kernels that need not be compiled here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import records
from benchmarks.budget import Budget
from benchmarks.first_run import portable
from benchmarks.machine import ROOT
from benchmarks.ops import OPS

ORDER = ("w4a16", "gram", "columns", "moe")
"""Operations in the order of the questions that a first run has to answer."""
TEST_SHARE = 0.4  # of the time, for all tests
LEAST = 20.0  # seconds of a part


@dataclass(frozen=True)
class Part:
    """One process. arguments: of `python -m`. weight: its share of what is left, beside those of the parts after it."""

    name: str
    arguments: tuple[str, ...]
    weight: float


@dataclass(frozen=True)
class Outcome:
    """How a part ended. status: "passed", "failed", "timed out" or "left out"."""

    name: str
    status: str
    seconds: float
    tail: str


def parts(out: Path, quick: bool, device: str) -> list[Part]:
    """All parts in their order. The minutes of a benchmark are filled in when it starts."""
    files: dict[str, None] = {}
    for name in ORDER:
        files |= dict.fromkeys(OPS[name].tests)
    pytest = ("pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider")
    tests = [Part(f"tests {Path(file).stem.removeprefix('test_')}", (*pytest, file), 1.0) for file in files]
    options = ("--out", str(out / "records.jsonl"), "--device", device, *["--quick"] * quick)
    timed = [Part(name, ("benchmarks.run", name, *options, "--skip-tests", "--minutes", "{}"), 3.0) for name in ORDER]
    whole = [Part(name, ("benchmarks.run", name, *options, "--minutes", "{}"), 2.0) for name in ("decode", "quantize")]
    return [*tests, *timed, *whole]


def run(todo: Sequence[Part], budget: Budget, out: Path, environment: dict[str, str]) -> list[Outcome]:
    """Run the parts one after another; the summary is written after each."""
    out.mkdir(parents=True, exist_ok=True)
    whole, result = budget.left(), []
    least = min(LEAST, whole / 20)  # the first parts get it, though none may be left for the last
    for at, part in enumerate(todo):
        testing = part.name.startswith("tests ")
        rest = [each for each in todo[at:] if each.name.startswith("tests ") == testing]
        left = budget.left() - ((1 - TEST_SHARE) * whole if testing else 0.0)
        share = max(least, left * part.weight / sum(each.weight for each in rest))
        result.append(_outcome(part, share, out, environment) if left > least else
                     Outcome(part.name, "left out", 0.0, "no time was left"))  # fmt: skip
        print(f"[{budget}] {part.name}: {result[-1].status} in {result[-1].seconds:.0f} s", flush=True)
        summary = {"outcomes": [asdict(each) for each in result], "to come": [each.name for each in todo[at + 1 :]]}
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return result


def _outcome(part: Part, seconds: float, out: Path, environment: dict[str, str]) -> Outcome:
    minutes = f"{max(seconds - 5, 1) / 60:.3f}"  # it ends by itself before it is ended
    arguments = [minutes if each == "{}" else each for each in part.arguments]
    command = [sys.executable, "-m", "benchmarks.first_run.portable", *arguments]
    log, began, status = out / f"{part.name.replace(' ', '-')}.log", time.monotonic(), "failed"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                   start_new_session=True)  # fmt: skip
        try:
            status = "passed" if process.wait(timeout=seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its own children too: compilers, ranks
            process.wait()
            status = "timed out"
    tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-12:])
    return Outcome(part.name, status, time.monotonic() - began, tail)


def missing(result: Iterable[dict]) -> list[str]:
    """A line for each goal that a timed contender of ours misses, the farthest first; the best of ours counts."""
    best: dict[tuple[str, str], tuple[float, float, str]] = {}
    for record in records.of_status(result, "timed"):
        goal = record.get("goal_seconds") or (
            record["roof_seconds"] / record["goal_share"] if record.get("goal_share") else None
        )
        if not (record["ours"] and record["part"] == "whole" and goal):
            continue
        key, took = (record["op"], record["point"]), record["seconds"]["p50"]
        if key not in best or took < best[key][0]:
            best[key] = (took, goal, record["contender"])
    over = sorted(((took / goal, key, took, goal, who) for key, (took, goal, who) in best.items()), reverse=True)
    return [
        f"{op} {point}: {took * 1e6:.1f} us by {who}, {ratio:.2f} of the goal of {goal * 1e6:.1f} us"
        for ratio, (op, point), took, goal, who in over
        if ratio > 1
    ]


def last_lines(outcomes: Sequence[Outcome], out: Path) -> list[str]:
    """What failed, and what is missing against the goals."""
    bad = [f"{each.name}: {each.status} ({out / (each.name.replace(' ', '-') + '.log')})"
           for each in outcomes if each.status != "passed"]  # fmt: skip
    file = out / "records.jsonl"
    result = records.read(file) if file.exists() else []
    timed = len(records.of_status(result, "timed"))
    return [
        f"{len(outcomes) - len(bad)} of {len(outcomes)} parts passed, {timed} numbers in {file}",
        *bad,
        *missing(result),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole run (default 9)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "first-run")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "gpu-cache", help="what `make gpu-cache` made")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that all of it works")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    environment = dict(os.environ)
    if options.cache.exists():
        cache = options.cache.resolve()
        environment |= {"TRITON_CACHE_DIR": str(cache / "triton"), "SARQC_CACHE": str(cache / "sarqc")}
        print(f"{portable.relocate(cache / 'triton')} compiled kernels from {cache}", flush=True)
    outcomes = run(parts(out, options.quick, options.device), Budget(options.minutes), out, environment)
    lines = last_lines(outcomes, out)
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    return int(any(each.status in ("failed", "timed out") for each in outcomes))

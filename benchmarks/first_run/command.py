"""A first run on a GPU: tests, then the points that matter, then the rest, and a last line for all that is missing.

Usage: python -m benchmarks.first_run [--minutes 9] [--out FOLDER] [--cache FOLDER] [--quick] [--device auto]

Every part is a process with its share of the time that is left; test files run side by side, what is timed runs alone.
What it measured is on disk as it is made, and a part that crashes, hangs or fails takes nothing from the others. FOLDER
holds four files in the end: `summary.json` (rewritten after each part), `records.jsonl` (as `benchmarks.run` writes
them), `log.txt` (the output of each part, added as it ends), `summary.txt`.
Needs nothing but this repository, torch, Triton and pytest (transformers for whole models); no network. --cache is what
`make gpu-cache` made, as a folder or as the archive beside it: kernels that need not be compiled here. What it lacks is
compiled, and named in the last lines. --rehearse does all of it without a GPU (`rehearsal`): every test fails then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks import records
from benchmarks.budget import Budget
from benchmarks.first_run import portable
from benchmarks.machine import ROOT
from benchmarks.ops import OPS
from sarqc_kernels.backend import ENVIRONMENT

ORDER = ("w4a16", "gram", "columns", "moe")
"""Operations in the order of the questions that a first run has to answer."""
AT_RISK = tuple(f"tests/kernels/test_{name}.py" for name in ("cholesky", "descent"))
"""Tests of small kernels of several products by four warps. Triton 3.4 to 3.7 with their ptxas are known to miscompile
such kernels for Hopper (triton #10486, #10573, #11366). They begin first, so an illegal access is seen at once."""
WAY_OUT = (
    f"if it is the compiler, {ENVIRONMENT}=reference runs every operation in plain torch; another triton, or a ptxas "
    "of CUDA 13.1 or later by TRITON_PTXAS_PATH, compiles the kernels anew"
)
ALSO = tuple(f"tests/kernels/test_{name}.py" for name in ("cross_gram", "gram_finalize", "dequant"))
"""Tests of kernels that no benchmark times alone, as those at risk."""
TESTED = ("pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "benchmarks.first_run.on_device")
TEST_SHARE = 0.4  # of the time, for all tests
LEAST = 20.0  # seconds of a part
LOG = 100_000  # characters of a part's output that are kept


@dataclass(frozen=True)
class Part:
    """One process. arguments: of `python -m`. weight: its share of what is left, beside those of the parts after it."""

    name: str
    arguments: tuple[str, ...]
    weight: float


@dataclass(frozen=True)
class Outcome:
    """How a part ended. status: "passed", "failed", "timed out" or "left out". tail: the end of what it printed.
    compiled: kernels, libraries and stubs that were not in the cache before, by name."""

    name: str
    status: str
    seconds: float
    tail: str
    compiled: tuple[str, ...] = ()


def test_files() -> list[str]:
    """Those at risk, then of every operation in the order of importance, each once, but for one that holds the
    reference alone."""
    files = dict.fromkeys([*AT_RISK, *(file for name in ORDER for file in OPS[name].tests), *ALSO])
    return [file for file in files if file != "tests/kernels/test_columns.py"]


def _tests_of(file: str) -> str:
    return f"tests {Path(file).stem.removeprefix('test_')}"


def parts(out: Path, quick: bool, device: str) -> list[Part]:
    """All parts in their order. The minutes of a benchmark are filled in when it starts."""
    tests = [Part(_tests_of(file), (*TESTED, file), 1.0) for file in test_files()]
    options = ("--out", str(out / "records.jsonl"), "--device", device, *["--quick"] * quick)
    timed = [Part(name, ("benchmarks.run", name, *options, "--skip-tests", "--minutes", "{}"), 3.0) for name in ORDER]
    whole = Part("whole", ("benchmarks.first_run.whole", *options), 3.0)
    last = [Part(name, ("benchmarks.run", name, *options, *own, "--minutes", "{}"), weight)
            for name, own, weight in (("quantize", (), 5.0), ("decode", ("--skip-tests",), 3.0))]  # fmt: skip
    return [*tests, *timed, whole, *last]


class Run:
    """Runs parts. budget: of all. environment: of each process. cache: where they find kernels and put others."""

    def __init__(self, budget: Budget, out: Path, environment: dict[str, str], cache: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.budget, self.out, self.environment = budget, out, environment
        self.cache, self.known = cache, portable.kernels(cache)
        self.whole, self.result = budget.left(), list[Outcome]()
        self.least = min(LEAST, self.whole / 20)  # the first parts get it, though none may be left for the last

    def all(self, todo: Sequence[Part]) -> list[Outcome]:
        """Tests, as many at a time as there are cores, then the others in turn; the summary is written after each."""
        tests = [part for part in todo if part.name.startswith("tests ")]
        for group, together in ((tests, os.cpu_count() or 1), ([part for part in todo if part not in tests], 1)):
            kept = (1 - TEST_SHARE) * self.whole if group is tests else 0.0
            with ThreadPoolExecutor(together) as pool:
                rest = [sum(part.weight for part in group[at:]) / together for at in range(len(group))]
                jobs = [pool.submit(self.one, part, part.weight / max(part.weight, behind), kept)
                        for part, behind in zip(group, rest)]  # fmt: skip
                for job in as_completed(jobs):
                    self._note(job.result(), [part.name for part in todo])
        return self.result

    def one(self, part: Part, share: float, kept: float = 0.0) -> Outcome:
        """A part with this share of the time that is left beside `kept` seconds."""
        left = self.budget.left() - kept
        if left <= self.least:
            return Outcome(part.name, "left out", 0.0, "no time was left")
        return _outcome(part, max(self.least, left * share), self.out, self.environment)

    def _note(self, outcome: Outcome, names: Sequence[str]) -> None:
        made = portable.kernels(self.cache) - self.known  # of tests side by side those of others too
        self.known |= made
        names_made = sorted(Path(path).name.partition(".")[0] for path in made)
        outcome = replace(outcome, compiled=tuple(names_made))
        self.result.append(outcome)
        compiled = f", {len(made)} kernels and stubs compiled" if made else ""
        print(f"[{self.budget}] {outcome.name}: {outcome.status} in {outcome.seconds:.0f} s{compiled}", flush=True)
        done = [each.name for each in self.result]
        summary = {"outcomes": [asdict(each) for each in self.result], "to come": [n for n in names if n not in done]}
        (self.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        own = self.out / f"{_file_name(outcome.name)}.log"
        if own.exists():
            with (self.out / "log.txt").open("a") as log:
                log.write(f"## {outcome.name}: {outcome.status} in {outcome.seconds:.0f} s\n")
                log.write(own.read_text(errors="replace")[-LOG:].rstrip() + "\n\n")
            own.unlink()


def _file_name(part: str) -> str:
    return part.replace(" ", "-")


def _outcome(part: Part, seconds: float, out: Path, environment: dict[str, str]) -> Outcome:
    minutes = f"{max(seconds - 5, 1) / 60:.3f}"  # it ends by itself before it is ended
    arguments = [minutes if each == "{}" else each for each in part.arguments]
    command = [sys.executable, "-m", "benchmarks.first_run.portable", *arguments]
    log, began, status = out / f"{_file_name(part.name)}.log", time.monotonic(), "failed"
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
    """What failed, what had to be compiled, and what is missing against the goals."""
    bad = [f"{each.name}: {each.status}: {(each.tail.splitlines() or ['no output'])[-1][:160]}"
           for each in outcomes if each.status != "passed"]  # fmt: skip
    file = out / "records.jsonl"
    result = records.read(file) if file.exists() else []
    timed = len(records.of_status(result, "timed"))
    at_risk = {_tests_of(file) for file in AT_RISK}
    suspect = [each.name for each in outcomes if each.name in at_risk and each.status in ("failed", "timed out")]
    compiled = Counter(name for each in outcomes for name in each.compiled)
    stubs = sum(compiled.pop(name, 0) for name in portable.STUBS)
    names = ", ".join(f"{count} {name}" for name, count in compiled.most_common(8))
    return [
        f"{len(outcomes) - len(bad)} of {len(outcomes)} parts passed, {timed} numbers, all in {out}",
        *bad,
        *([f"{', '.join(suspect)}: {WAY_OUT}"] if suspect else []),
        *([f"{compiled.total()} kernels were compiled here: {names}"] if compiled else []),
        *([f"{stubs} stubs of launches were compiled here: no cache carries them"] if stubs else []),
        *missing(result),
    ]


def carried(cache: Path) -> dict[str, str]:
    """Environment variables with which a carried cache is used; says where it is of no use."""
    archive = cache.with_suffix(".tar.gz")
    if not cache.exists() and archive.exists():
        with tarfile.open(archive) as file:
            file.extractall(cache.parent, filter="data")
    if not cache.exists():
        print(f"no {cache}: every kernel is compiled here, see `make gpu-cache`", flush=True)
        return {}
    kernels, made, own = portable.relocate(cache / "triton"), portable.made_with(cache), portable.version()
    useless = f"; OF NO USE HERE, where triton is {own}" if made != own else ""
    print(f"{kernels} kernels of triton {made} from {cache}{useless}", flush=True)
    return portable.variables(cache)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole run (default 9)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "first-run")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "gpu-cache", help="what `make gpu-cache` made")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that all of it works")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rehearse", action="store_true", help="with a GPU that is not there: see `rehearsal`")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    budget = Budget(options.minutes)
    environment = os.environ | carried(options.cache.resolve()) | ({portable.REHEARSE: "1"} if options.rehearse else {})
    outcomes = Run(budget, out, environment, options.cache.resolve()).all(parts(out, options.quick, options.device))
    lines = last_lines(outcomes, out)
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    return int(any(each.status in ("failed", "timed out") for each in outcomes))

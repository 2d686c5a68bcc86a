"""Measure: python -m benchmarks.run [gram|columns|w4a16|moe|all|decode|quantize] [--quick] [--skip-tests] [--out FILE].

Runs the tests of what it times first and refuses what fails. Then measures the card (copy bandwidth, bf16 products) and
times every shape against the rivals that are installed, in order of importance, as long as --minutes last; what is not
installed, not right or not reached is listed with its reason. One JSON line for each goes to
benchmarks/results/<gpu>.jsonl; a quick run or one on a CPU goes to --out, or a file in the temporary folder.

`all` is everything that fits, decode steps of whole models (`decode`) and an end-to-end run (`quantize`) included;
every part gets a process of its own, so that one that crashes takes no other with it. `decode --help` and
`quantize --help` have options of their own.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import gate, machine, measure, records
from benchmarks.budget import Budget
from benchmarks.ops import OPS

WHOLE = ("decode", "quantize")
"""What is measured of whole models, each a command with options of its own, imported when it runs: operations are timed
where a package that whole models need is missing."""

GATE_SHARE = 0.5  # of the time that the tests may take
SECONDS = {True: 0.02, False: 0.4}  # of the clock for each contender at a point: quick, or not


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] and arguments[0] in WHOLE:
        status: int = importlib.import_module(f"benchmarks.{arguments[0]}.command").main(arguments[1:])
        return status
    options = _options(arguments)
    device, budget = machine.device_of(options.device), Budget(options.minutes)
    out = options.out or machine.place(device, options.quick)
    chosen = list(OPS) if options.what == "all" else [options.what]
    tested, refused = options.tested_before, []
    sink = records.Sink(out, {**machine.facts(device, options.commit), "tested": tested, "quick": options.quick})
    if not (options.skip_tests or tested):
        print(f"[{budget}] tests of {', '.join(chosen)} first", flush=True)
        refused = _refused(chosen, budget, sink)
        chosen, tested = [name for name in chosen if name not in refused], True
        sink.facts["tested"] = True
    status = int(bool(refused))
    if options.what == "all":
        status |= _everything(chosen, options, out, budget, tested)
    elif chosen:
        _here(chosen, options, device, budget, sink)
    print(f"[{budget}] {out}", flush=True)
    return status


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="all", choices=[*OPS, "all", *WHOLE])
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that all of it works")
    parser.add_argument("--skip-tests", action="store_true", help="time without running the tests first")
    parser.add_argument("--out", type=Path, help="file to append to")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole run, tests included (default 9)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--tested-before", action="store_true", help=argparse.SUPPRESS)  # said by `all` to its parts
    return parser.parse_args(arguments)


def _refused(chosen: Sequence[str], budget: Budget, sink: records.Sink) -> list[str]:
    """The ops whose tests fail, each with a record that says so."""
    result = gate.verdicts({name: OPS[name].tests for name in chosen}, GATE_SHARE * budget.left())
    refused = {name: reason for name, reason in result.items() if reason}
    for name, reason in refused.items():
        print(f"[{budget}] {name} is not timed: {reason}", flush=True)
        sink.add(records.untimed("refused", OPS[name], None, None, reason))
    return list(refused)


def _here(chosen: Sequence[str], options: argparse.Namespace, device: torch.device, budget: Budget,
          sink: records.Sink) -> None:  # fmt: skip
    """Time in this process."""
    roof = machine.measure_roof(device, options.quick)
    print(f"[{budget}] roof: {roof.bandwidth / 1e9:.0f} GB/s, {roof.flops / 1e12:.3g} TFLOP/s", flush=True)
    settings = measure.Settings(device, options.quick, SECONDS[options.quick])
    for name in chosen:
        measure.measure(OPS[name], settings, roof, budget, sink)


def _everything(chosen: Sequence[str], options: argparse.Namespace, out: Path, budget: Budget, tested: bool) -> int:
    """Every op and then whole models, each in a process of its own with its share of the time that is left."""
    status = 0
    parts = [*chosen, *WHOLE]
    for number, part in enumerate(parts):
        minutes = budget.left() / 60 / (len(parts) - number)
        command = [sys.executable, "-m", "benchmarks.run", part, "--out", str(out), "--device", options.device,
                   "--minutes", f"{minutes:.3f}", *["--quick"] * options.quick]  # fmt: skip
        if part != "quantize":
            command += ["--tested-before"] if tested else ["--skip-tests"]
        command += ["--commit", options.commit] if options.commit else []
        print(f"[{budget}] {part}", flush=True)
        try:  # a kernel that hangs must not take the time of the others
            ended = subprocess.run(command, cwd=machine.ROOT, timeout=max(30.0, 90 * minutes)).returncode
        except subprocess.TimeoutExpired:
            ended = 124
        if ended:
            print(f"[{budget}] {part} ended with {ended}; what it had measured is kept", flush=True)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())

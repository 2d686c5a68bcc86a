"""What a run costs on a machine that does other things: a second run beside it, or threads that are busy.

    python -m benchmarks.contention MODEL TEXT results.json [--rounds 3] [--set GOMP_SPINCOUNT=...] [--busy 0 1 3]

Each run is the command line's own process, imports included. OpenMP's threads wait for each other in thousands of small
operations; how they wait decides what a busy core costs. --set compares another setting with the default one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.machine import device_of, facts
from sarqc.system import versions

BUSY = "while True: pass"


def timed(model: str, text: str, together: int, settings: dict[str, str]) -> float:
    """Wall seconds until `together` concurrent runs have ended."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sarqc", "quantize", model, "--dataset", text]
        command += ["--num-samples", "16", "--seqlen", "512", "--group-size", "64"]
        began = time.perf_counter()
        runs = [
            subprocess.Popen(
                [*command, "--output", f"{folder}/{number}"],
                env=os.environ | settings,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for number in range(together)
        ]
        codes = [run.wait() for run in runs]  # of all: none may go on
        if any(codes):
            raise SystemExit(f"{' '.join(command)} failed")
        return time.perf_counter() - began


@contextmanager
def busy(threads: int) -> Iterator[None]:
    """Processes that keep a core busy each, `threads` of them."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(threads)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(model: str, text: str, beside: Sequence[int], settings: dict[str, str]) -> dict[str, float]:
    """Wall seconds of a run alone, of two concurrent runs, and of a run beside each number of busy threads."""
    times = {"alone": timed(model, text, 1, settings), "two at once": timed(model, text, 2, settings)}
    for threads in beside:
        with busy(threads):
            times[f"beside {threads} busy"] = timed(model, text, 1, settings)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("results", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--busy", type=int, nargs="*", default=[1, 3])
    args = parser.parse_args()
    settings = dict(setting.split("=", 1) for setting in args.set)
    timed(args.model, args.text, 1, settings)  # compiles what is not compiled yet
    rounds = [measure(args.model, args.text, args.busy, settings) for _ in range(args.rounds)]
    seconds = {name: round(statistics.median(each[name] for each in rounds), 2) for name in rounds[0]}
    ratios = {name: round(taken / seconds["alone"], 2) for name, taken in seconds.items() if name != "alone"}
    record: dict[str, Any] = {
        "seconds": seconds,
        "ratios": ratios,
        "settings": settings,
        "rounds": rounds,
        "versions": versions(),
    }
    record |= {"machine": facts(device_of("cpu")), "cpus": os.cpu_count()}
    args.results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"seconds": seconds, "ratios": ratios}, indent=2))


if __name__ == "__main__":
    main()

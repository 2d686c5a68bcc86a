"""Command line of the ahead-of-time check; exit status 1 where a kernel has a problem."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import triton

from benchmarks.aot import compiler, csrc, jobs, table
from benchmarks.aot.jobs import AotJob
from benchmarks.aot.other import paths_of
from benchmarks.aot.table import Built

ROOT = Path(__file__).parents[2]
SLOW = 20.0  # seconds of one compilation that are worth a line: the whole check should take less than ten minutes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.add_argument("--also", metavar="VERSION", help="then do it with this version of triton, fetched into build/")
    parser.add_argument("--room", action="append", default=[], choices=jobs.ROOMS, help="one operation (or more)")
    parser.add_argument("--match", default="", help="kernels whose name contains this")
    parser.add_argument("--arch", type=int, action="append", default=[], help="80, 90, 100 or 120 (again for more)")
    parser.add_argument("--check-only", action="store_true", help="write no table")
    parser.add_argument("--no-csrc", action="store_true", help="leave csrc/ out")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at a time (default: cores)")
    options = parser.parse_args()
    partial = bool(options.match or options.check_only)
    bad = _triton(jobs.collect(options.room, options.match, options.arch), options.processes, partial)
    if not (options.no_csrc or options.room or options.match):
        bad += _csrc(options.arch, options.processes, partial)
    if options.also and options.also != triton.__version__:
        bad += _other_triton(options.also, [arg for arg in sys.argv[1:] if arg not in ("--also", options.also)])
    return int(bad > 0)


def _triton(result: Sequence[AotJob], processes: int, partial: bool) -> int:
    """One operation and card after another, each in the table as it ends; Triton's cache keeps what was compiled."""
    title, name, bad = f"triton {triton.__version__}", f"aot-triton-{triton.__version__}.md", 0
    for _, group in itertools.groupby(result, lambda job: (job.arch, job.name.split()[0])):
        bad += _report(title, name, _in_parallel(compiler.build, [(job,) for job in group], processes), partial)
    print(f"{title}: {len(result)} kernels, {bad} with problems", flush=True)
    return bad


def _csrc(archs: Sequence[int], processes: int, partial: bool) -> int:
    nvcc, works = csrc.nvcc(), csrc.works(archs)
    if nvcc is None or not works:
        print("csrc: " + ("nothing to compile" if nvcc else "nvcc is not on the path; not compiled"))
        return 0
    path, version = nvcc
    parts = _in_parallel(csrc.compile_file, [(path, *work) for work in works], processes)
    lines = [line for part in parts for line in part]
    bad = _report(f"csrc, nvcc {version}", f"aot-nvcc-{version}.md", lines, partial)
    print(f"csrc, nvcc {version}: {len(lines)} kernels, {bad} with problems", flush=True)
    return bad


def _report(title: str, name: str, lines: list[Built], partial: bool) -> int:
    """Print what is wrong, write the lines into the table; returns the number of kernels with problems."""
    bad = [line for line in lines if line.problems]
    for line in bad:
        print(f"{line.name} {line.arch}: {'; '.join(line.problems)}")
    if not partial:
        print(f"{len(lines)} lines -> {table.write(name, title, lines).relative_to(ROOT)}", flush=True)
    return len(bad)


def _other_triton(version: str, arguments: list[str]) -> int:
    """The same run in another process that imports another triton, from a folder that only this check uses."""
    try:
        path = paths_of(version)
    except RuntimeError as error:
        print(f"{error}; not checked with it")
        return 0
    command = [sys.executable, "-m", "benchmarks.aot", "--no-csrc", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode


_WORK: list[tuple] = []  # inherited by forked workers: a jitted function cannot be pickled


def _in_parallel(function, work: list[tuple], processes: int) -> list:
    """function(*arguments) for each of `work`, in order, `processes` at a time."""
    _WORK[:] = [(function, arguments) for arguments in work]
    begin = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(max(1, min(processes, len(work)))) as pool:
        results = pool.map(_run, range(len(_WORK)), chunksize=1)
    longest = max((seconds for seconds, _ in results), default=0.0)
    print(f"{len(work)} compilations in {time.perf_counter() - begin:.0f} s, the longest {longest:.0f} s", flush=True)
    return [result for _, result in results]


def _run(index: int):
    function, arguments = _WORK[index]
    begin = time.perf_counter()
    result = function(*arguments)
    seconds = time.perf_counter() - begin
    if seconds > SLOW:
        print(f"{seconds:.0f} s: {getattr(arguments[0], 'name', arguments[1:])}", flush=True)
    return seconds, result

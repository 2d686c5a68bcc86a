"""Nothing is timed that fails its own tests: pytest in a process of its own for each file of them, all side by side.

Much of their time is compilation, and a reference on one core: files of one operation need not wait for each other.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def verdicts(suites: Mapping[str, Sequence[str]], seconds: float) -> dict[str, str | None]:
    """For each op None where its tests pass, otherwise the reason why it must not be timed.

    suites: test files (or pytest ids) by op, relative to the repository. seconds: for all of them together; tests that
    have not ended by then count as failed. Raises nothing.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "addopts=", "-p", "no:cacheprovider"]
    until = time.monotonic() + seconds
    every = dict.fromkeys(file for files in suites.values() for file in files)  # operations share some
    started = {
        file: subprocess.Popen([*command, file], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for file in every
    }
    by_file = {file: _verdict(process, until - time.monotonic()) for file, process in started.items()}
    return {op: next((by_file[file] for file in files if by_file[file]), None) for op, files in suites.items()}


def _verdict(process: subprocess.Popen[str], seconds: float) -> str | None:
    try:
        printed, _ = process.communicate(timeout=max(0.1, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "its tests did not end in time: give more --minutes, or run them first and pass --skip-tests"
    if process.returncode == 0:
        return None
    lines = [line for line in printed.splitlines() if line.startswith(("FAILED", "ERROR"))] or printed.splitlines()
    return f"its tests fail: {lines[0][:200] if lines else f'pytest ended with {process.returncode}'}"

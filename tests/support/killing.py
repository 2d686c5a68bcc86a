"""Runs that are killed: in a forked child, by SIGKILL, right before a file operation of a given number.

What is on disk changes only in file operations. A kill between two of them finds the same disk whenever it comes, so
killing before the n-th one, for every n, would be killing at every moment. It does not depend on the machine's speed.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sarqc
from tests.support.faults import Outcomes

KILLS = int(os.environ.get("SARQC_KILLS", "10"))
FILES = (io.FileIO, io.BufferedWriter, io.TextIOWrapper)


def is_file_operation(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    return isinstance(owner, FILES) or getattr(owner, "__name__", None) == "posix"


def in_child(action: Callable[[], object], kill_at: int | None = None, kill_after: float | None = None) -> int:
    """Run `action` in a forked child; its exit code, or -9 where it was killed.

    kill_at: before the file operation of this number (from 1). kill_after: after this number of seconds.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if kill_at is not None:
                sys.setprofile(_killer(kill_at))
            action()
            code = 0
        finally:
            sys.setprofile(None)
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _killer(number: int) -> Callable[[Any, str, Any], None]:
    left = number

    def profile(frame: Any, event: str, function: Any) -> None:
        nonlocal left
        if event == "c_call" and is_file_operation(function):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return profile


def count_operations(action: Callable[[], object]) -> int:
    """File operations of `action`, which is run here."""
    count = 0

    def profile(frame: Any, event: str, function: Any) -> None:
        nonlocal count
        count += event == "c_call" and is_file_operation(function)

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file but the reports, whose times differ."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.stem != "report"}


def leftovers(folder: Path) -> list[str]:
    """What lies beside the output."""
    return sorted(path.name for path in folder.iterdir() if path.name != "out")


def kill_again_and_again(
    run: dict[str, Any],
    expected: dict[str, bytes],
    place: Path,
    outcomes: Outcomes,
    kills: int,
    moment: Callable[[], dict[str, Any]],
) -> None:
    """Kill a run `kills` times, and let it go on each time; `moment()` says when, as `in_child` takes it.

    A kill that came too late, after the end of a run, counts for nothing; the next one strikes a new run.
    """
    out = place / "out"
    killed = struck = 0
    while killed < kills:
        code = in_child(lambda: sarqc.quantize(**run, out=out), **moment())
        assert code in (0, -9)
        killed, struck = killed + (code == -9), struck + (code == -9)
        if out.exists():
            outcomes.recovered(contents(out), expected, trials=struck)
            shutil.rmtree(out)
            struck = 0
    sarqc.quantize(**run, out=out)
    outcomes.recovered(contents(out), expected, trials=struck)
    assert leftovers(place) == []

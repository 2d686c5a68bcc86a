"""Ranks as forked children: what torchrun's processes are, without a start of Python for each."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from sarqc.errors import SarqcError


def in_ranks(size: int, action: Callable[[int], object], log: Path, seconds: float = 60) -> list[tuple[int, str]]:
    """Run `action(rank)` in `size` children that find each other; exit code and last words of each.

    0: it returned. 2: it raised one of our errors, whose text the words are. 1: anything else. Whoever has not ended in
    time is killed, and has -9; so is one that was stopped, once all others have ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.mkdir(exist_ok=True)
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            os._exit(_run(action, rank, log / f"{rank}"))
        children.append(child)
    codes: dict[int, int] = {}
    stopped: set[int] = set()
    until = time.monotonic() + seconds
    while len(codes) < size:
        for rank, child in enumerate(children):
            if rank not in codes:
                if time.monotonic() > until or len(stopped | codes.keys()) == size:
                    os.kill(child, signal.SIGKILL)
                ended, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
                if ended and os.WIFSTOPPED(status):
                    stopped.add(rank)
                elif ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    words = [(log / f"{rank}").read_text() if (log / f"{rank}").exists() else "" for rank in range(size)]
    return [(codes[rank], words[rank]) for rank in range(size)]


def _run(action: Callable[[int], object], rank: int, log: Path) -> int:
    try:
        action(rank)
    except SarqcError as error:
        log.write_text(str(error))
        return 2
    except BaseException:  # noqa: BLE001 (the child must not go on into the tests that its parent runs)
        log.write_text(traceback.format_exc())
        return 1
    finally:
        sys.stdout.flush()
    return 0

"""Heartbeats between ranks, apart from progress: a rank may solve for an hour, but its heart must beat.

A rank that ends is noticed at once, because its connections break. A rank that was stopped, or whose machine hangs,
keeps them open and looks busy to the others. So a thread of each rank increments a counter in torchrun's store and
reads the counters of the others. A second thread, which never waits, checks that they move and that the store answers.

Silence is counted in the rank's own rounds, not by a clock: a rank that was itself stopped for an hour made no rounds.

Where a rank is silent for too long, each of the others reports it and ends its process. An exception would not reach
the thread at work, which is inside a collective. The work folder is valid at any moment.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, Protocol

BEAT = 5.0
"""Seconds between two signs of life."""
WATCHDOG_TIMEOUT = 600.0
"""Seconds without one after which a rank counts as stuck. Long, because beats also stop while a machine stalls that
will go on (a network disk that hangs, a virtual machine that moves), and a run that ends has to be started again."""

_SHOW_CURSOR = b"\x1b[?25h"


class Store(Protocol):
    """What is needed of a store of torch.distributed."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number, 0 at first; returns what it is then."""

    def set(self, key: str, value: str) -> None:
        """Keep a text."""

    def get(self, key: str) -> bytes:
        """That text, once it is there."""


class Heartbeat:
    """The rank that beats. heard: the last number of each other rank; 0 for one that has not come yet. names: who those
    are that have. answers: rounds in which the store answered."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.heard = {other: 0 for other in range(size) if other != rank}
        self.names: dict[int, str] = {}
        self.answers = 0
        self._store = store

    def beat(self) -> None:
        """One sign of life, and a look at the others'; waits for as long as the store does not answer."""
        if self.answers == 0:
            self._store.set(f"sarqc name {self.rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self._store.add(f"sarqc beat {self.rank}", 1)
        for other in self.heard:
            self.heard[other] = self._store.add(f"sarqc beat {other}", 0)
            if self.heard[other] and other not in self.names:
                self.names[other] = self._store.get(f"sarqc name {other}").decode()
        self.answers += 1


class Watch:
    """Rounds in which a rank heard nothing new. limit: the number that is too many."""

    def __init__(self, heartbeat: Heartbeat, limit: int) -> None:
        self._heart, self._limit = heartbeat, limit
        self._before: dict[int, int] = {}
        self._silent: dict[int, int] = {}

    def look(self) -> str | None:
        """One round; the stuck rank, or None. The store is checked first: every heartbeat goes through it."""
        heartbeat = self._heart
        for who, number in ({heartbeat.rank: heartbeat.answers} | heartbeat.heard).items():
            self._silent[who] = self._silent.get(who, 0) + 1 if self._before.get(who) == number else 0
            self._before[who] = number
        if self._silent[heartbeat.rank] >= self._limit:
            return "the process that keeps the ranks together (torchrun's, or rank 0) has not answered"
        stuck = [who for who in heartbeat.heard if self._silent[who] >= self._limit]
        if not stuck:
            return None
        name = f"rank {stuck[0]} ({heartbeat.names.get(stuck[0], 'which never began')})"
        return f"{name}{f' and {len(stuck) - 1} more' if stuck[1:] else ''} has given no sign of life"


@contextmanager
def heartbeats(store: Store, rank: int, size: int) -> Iterator[None]:
    """Give signs of life, and end this process where another rank gives none for `WATCHDOG_TIMEOUT` seconds.

    store: a connection of its own, for a blocked one blocks all who share it.
    """
    heartbeat, done = Heartbeat(store, rank, size), threading.Event()
    watch = Watch(heartbeat, max(2, round(WATCHDOG_TIMEOUT / BEAT)))
    threading.Thread(target=_beats, args=(heartbeat, done), daemon=True).start()
    threading.Thread(target=_looks, args=(watch, heartbeat, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _beats(heartbeat: Heartbeat, done: threading.Event) -> None:
    while not done.is_set():
        try:
            heartbeat.beat()
        except RuntimeError:  # the store is gone: the watch will say so, unless a broken connection does before
            return
        done.wait(BEAT)


def _looks(watch: Watch, heartbeat: Heartbeat, done: threading.Event) -> None:
    while not done.wait(BEAT):
        if stuck := watch.look():
            _end(
                f"rank {heartbeat.rank} of {heartbeat.size}: {stuck} for {WATCHDOG_TIMEOUT:g} seconds: see whether it "
                "is stopped or its machine hangs; the same command resumes at the last block, with any number of ranks"
            )


def _end(line: str) -> NoReturn:
    """Say it and end, whatever the other threads do: one of them may hold the lock of `sys.stderr`."""
    os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + f"sarqc: {line}\n".encode())
    os._exit(2)

"""A time that is kept: nothing is begun that will not end in it, going by what steps of its kind took lately."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Budget:
    """minutes: from now. first_guess: seconds of a step before any was seen. clock: for tests."""

    def __init__(self, minutes: float, first_guess: float = 15.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + 60 * minutes
        self._expected = first_guess
        self._seen = False

    def left(self) -> float:
        """Seconds."""
        return self._end - self._clock()

    def has_time(self) -> bool:
        """Whether a step as long as those before would end in time."""
        return self.left() > self._expected

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step by which the next ones are judged: each for half as long as the one after it, and the first for half
        of what it took, as it compiles what later ones use."""
        began = self._clock()
        yield
        taken = self._clock() - began
        self._expected = max(taken, self._expected / 2) if self._seen else taken / 2
        self._seen = True

    def __str__(self) -> str:
        seconds = max(0, round(self.left()))
        return f"{seconds // 60}:{seconds % 60:02d} left"

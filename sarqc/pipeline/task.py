"""One micro-batch of a forward in a greenlet: it runs the model, and suspends where it reaches a point that is wanted.

Switching is safe wherever Python runs, so in a hook too; what torch keeps for the thread is exchanged on every switch.
An error of the model is raised where the task was resumed, by whoever did that.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet

from sarqc.errors import SarqcError
from sarqc.pipeline.thread_state import InferenceSwitch, ThreadState

_ATTEMPTS = 8
"""How often a task that catches every exception is ended again."""


class Task(greenlet):
    """A micro-batch. call: runs the forward. number: of the micro-batch. wanted: which points it suspends at; others it
    passes. within: a context that holds while the task runs."""

    def __init__(
        self,
        call: Callable[[], object],
        number: int,
        wanted: Callable[[Hashable], bool],
        within: AbstractContextManager[Any] | None = None,
    ) -> None:
        super().__init__()
        self.gr_context = contextvars.copy_context()  # otherwise it would begin with an empty one
        self.number = number
        self.wanted = wanted
        self.ended = False
        self.replayed: torch.Tensor | None = None  # hidden states that it has entered the model's middle with
        self._call = call
        self._within = within or nullcontext()
        self._state: ThreadState | None = None
        self._inference = InferenceSwitch()
        self._passed: set[Hashable] = set()

    def run(self) -> object:
        """The forward; its result goes to the last caller of `resume`."""
        try:
            with torch.no_grad(), self._within:
                return self._call()
        finally:
            self.ended = True

    def reach(self, point: Hashable, arrival: object) -> None:
        """Called by hooks while the task runs: suspend here, if that is wanted; each point counts once."""
        if point in self._passed or not self.wanted(point):
            return
        self._passed.add(point)
        driver = self.parent
        assert driver is not None
        driver.switch(arrival)

    def resume(self) -> object:
        """Run on to the next wanted point; what it brought there, or what the forward returned where that has ended."""
        return self._switch(self.switch)

    def close(self) -> None:
        """End a task that is suspended: its `finally` clauses run, and its tensors are let go."""
        for _ in range(_ATTEMPTS):
            if self.dead or not self:  # ended, or never begun
                break
            self._switch(lambda: self.throw(GreenletExit))
        else:
            raise SarqcError(f"micro-batch {self.number} does not end: the model's code catches every exception")
        self._call, self._within = lambda: None, nullcontext()
        self._passed.clear()

    def _switch(self, there: Callable[[], object]) -> object:
        outer = ThreadState.capture()
        self.parent = getcurrent()
        try:
            if self._state is not None:
                self._inference.enter_task()
                self._state.restore()
            return there()
        finally:
            self._state = ThreadState.capture()
            if not self.dead:
                self._inference.leave_task(outer.inference)
            outer.restore()

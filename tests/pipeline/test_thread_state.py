"""What a model sets for its thread around a layer stays with the micro-batch that set it."""

from __future__ import annotations

import contextlib
import contextvars

import pytest
import torch
from greenlet import GreenletExit
from torch.utils._python_dispatch import TorchDispatchMode

from sarqc.errors import SarqcError
from sarqc.pipeline.points import Arrival, Point
from sarqc.pipeline.task import Task
from sarqc.pipeline.thread_state import ThreadState

HERE = Point("site", 0, "here")


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS = {
    "grad": torch.enable_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "dispatch": Counting,
    "dtype": lambda: default_dtype(torch.float64),
}


def seen():
    state = ThreadState.capture()
    value = torch.ones(2)
    return state, value.dtype, value.device.type, value.requires_grad, (value[None] @ torch.ones(2, 1)).dtype


def stop():
    from greenlet import getcurrent

    getcurrent().reach(HERE, Arrival(HERE))  # type: ignore[attr-defined] # a Task


@pytest.mark.parametrize("inside", CONTEXTS)
@pytest.mark.parametrize("outside", [None, *CONTEXTS])
def test_neither_the_driver_nor_the_next_micro_batch_sees_it(inside, outside):
    states = {}

    def setting():
        with CONTEXTS[inside]():
            states["before"] = seen()
            stop()
            states["after"] = seen()

    def other():
        states["other before"] = seen()
        stop()
        states["other after"] = seen()

    with CONTEXTS[outside]() if outside else contextlib.nullcontext(), torch.no_grad():
        driver = seen()
        tasks = [Task(setting, 0, lambda _: True), Task(other, 1, lambda _: True)]
        for _ in range(2):
            for task in tasks:
                task.resume()
                assert seen() == driver
        assert all(task.ended for task in tasks)
    assert states["before"] == states["after"] != driver or inside == outside
    assert states["other before"] == states["other after"] == driver
    assert ThreadState.capture() == ThreadState.capture() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("inside", CONTEXTS)
def test_a_closed_or_failed_task_leaves_nothing_set(inside):
    def setting(fail):
        with CONTEXTS[inside]():
            stop()
            if fail:
                raise ValueError

    before = ThreadState.capture()
    closed, failed = Task(lambda: setting(False), 0, lambda _: True), Task(lambda: setting(True), 1, lambda _: True)
    closed.resume(), failed.resume()
    closed.close()
    assert ThreadState.capture() == before
    with pytest.raises(ValueError):
        failed.resume()
    assert ThreadState.capture() == before and closed.ended and failed.ended


def test_a_task_has_the_context_variables_of_its_driver():
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(5)
    task = Task(variable.get, 0, lambda _: True)
    assert task.resume() == 5


def test_a_task_that_catches_the_end_is_ended_all_the_same():
    def stubborn():
        with contextlib.suppress(GreenletExit):  # and goes on to its end
            stop()

    task = Task(stubborn, 0, lambda _: True)
    task.resume()
    task.close()
    assert task.ended

    def endless():
        while True:
            with contextlib.suppress(BaseException):
                getcurrent_switch()

    def getcurrent_switch():
        from greenlet import getcurrent

        getcurrent().parent.switch()

    task = Task(endless, 3, lambda _: True)
    task.resume()
    with pytest.raises(SarqcError, match="3"):
        task.close()

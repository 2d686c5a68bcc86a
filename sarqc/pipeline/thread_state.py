"""What torch keeps for a thread as a whole, saved and restored where greenlets of that thread switch.

A greenlet has a Python stack of its own, but shares the thread's state: gradient and inference mode, autocast, the
stacks of function and dispatch modes (`with torch.device(...)` is one of them), and the default dtype. A model may set
any of them around a layer. Without care the next micro-batch, and the driver, would run with what the last one set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_DEVICE_TYPES = ("cpu", "cuda")

Autocast = tuple[bool, torch.dtype]


@dataclass(frozen=True)
class ThreadState:
    """A copy of torch's state of the calling thread. autocast: by device type, (enabled, dtype)."""

    grad: bool
    inference: bool
    default_dtype: torch.dtype
    autocast: tuple[Autocast, ...]
    autocast_cache: bool
    function_modes: list[Any]
    dispatch_modes: list[Any]

    @classmethod
    def capture(cls) -> ThreadState:
        """The state of the calling thread as it is."""
        return cls(
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            default_dtype=torch.get_default_dtype(),
            autocast=tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _DEVICE_TYPES),
            autocast_cache=torch.is_autocast_cache_enabled(),
            function_modes=_get_current_function_mode_stack(),
            dispatch_modes=_get_current_dispatch_mode_stack(),
        )

    def restore(self) -> None:
        """Make this the state of the calling thread; inference mode is left to `InferenceSwitch`."""
        if torch.is_grad_enabled() != self.grad:
            torch._C._set_grad_enabled(self.grad)
        if torch.get_default_dtype() != self.default_dtype:
            torch.set_default_dtype(self.default_dtype)
        for kind, (enabled, dtype) in zip(_DEVICE_TYPES, self.autocast):
            if (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) != (enabled, dtype):
                torch.set_autocast_enabled(kind, enabled)
                torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        _exchange(
            _get_current_function_mode_stack(),
            self.function_modes,
            torch._C._pop_torch_function_stack,
            torch._C._push_on_torch_function_stack,
        )
        _exchange(
            _get_current_dispatch_mode_stack(),
            self.dispatch_modes,
            lambda: torch._C._pop_torch_dispatch_stack(None),
            torch._C._push_on_torch_dispatch_stack,
        )


class InferenceSwitch:
    """Inference mode between a suspended task and its driver.

    torch sets this mode by a guard alone, which writes the state of its making back where it ends. So the driver's mode
    is a guard around the time that the task is suspended, and its end gives the task its own state back.
    """

    def __init__(self) -> None:
        self._guard: Any = None

    def leave_task(self, driver: bool) -> None:
        """Take the driver's inference mode where the task's is another."""
        if torch.is_inference_mode_enabled() != driver:
            self._guard = torch._C._InferenceMode(driver)
            self._guard.__enter__()

    def enter_task(self) -> None:
        """Give the task back what it had."""
        if self._guard is not None:
            self._guard.__exit__(None, None, None)
            self._guard = None


def _exchange(
    held: Sequence[Any], wanted: Sequence[Any], pop: Callable[[], object], push: Callable[[Any], object]
) -> None:
    """Put the modes of one stack in the place of those that are on it, where they are others."""
    if len(held) == len(wanted) and all(map(is_, held, wanted)):
        return
    for _ in held:
        pop()
    for mode in wanted:
        push(mode)

"""The time of single operations inside a run, seen at torch's dispatcher: the product has no hooks for it.

While the mode is active, calls of the operations in `NAMES` are timed wherever they are made; everything else passes.
On a card the time lies between two events on the stream, so nothing waits; `seconds` waits once, at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAMES: Mapping[str, str] = {
    "sarqc::gram_accumulate_": "gram",
    "sarqc::gram_finalize": "finalize",
    "sarqc::quantize_columns": "columns",
    "sarqc::fit_grid": "grids",
    "sarqc::round_to_grid": "grids",
    "sarqc::cholesky_upper": "factor",
    "aten::linalg_cholesky_ex": "factor",
}


class OpTimes(TorchDispatchMode):
    """A context that keeps the time of every operation of `NAMES`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._on_card = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        label = NAMES.get(func._schema.name)
        if label is None:
            return func(*args, **kwargs)
        begin = self._now()
        out = func(*args, **kwargs)
        self._spans.append((label, begin, self._now()))
        return out

    def seconds(self) -> dict[str, float]:
        """Seconds by label since the beginning; waits for the device."""
        between: Callable[[Any, Any], float] = lambda begin, end: end - begin  # noqa: E731
        if self._on_card:
            torch.cuda.synchronize()
            between = lambda begin, end: begin.elapsed_time(end) / 1000  # noqa: E731
        totals = dict.fromkeys(NAMES.values(), 0.0)
        for label, begin, end in self._spans:
            totals[label] += between(begin, end)
        return totals

    def _now(self) -> Any:
        if not self._on_card:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

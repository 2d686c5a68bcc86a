"""The record of the block at work: its stages with their seconds, and notes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

OnProgress = Callable[[int, str], None]


class Journal:
    """seconds: of each stage of the block at work. notes: what did not go as planned, in words. current: the stage."""

    def __init__(self, on_progress: OnProgress | None, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.current = ""
        self._announce = on_progress or (lambda *_: None)
        self._device = device

    def begin_block(self) -> None:
        """Clear the record."""
        self.seconds, self.notes = {}, []

    @contextmanager
    def stage(self, index: int, name: str, site: str = "") -> Iterator[None]:
        """Announce a stage of block `index`, at a site where it has one, and add its wall time to `seconds`."""
        self.current = name
        self._announce(index, f"{name} {site.rpartition('.')[2]}".rstrip())
        began = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

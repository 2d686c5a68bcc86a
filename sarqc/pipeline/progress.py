"""Progress of a run, as the run reports it."""

from __future__ import annotations

from typing import Protocol

from sarqc.pipeline.driver import BlockResult


class Progress(Protocol):
    """Receives the progress of a run. All methods are called from the thread that runs it."""

    def note(self, text: str) -> None:
        """One line: a choice, a warning, what is being read."""

    def begin_blocks(self, blocks: int, done: int) -> None:
        """The blocks start: their number, and how many an earlier run finished."""

    def stage(self, block: int, name: str) -> None:
        """Block number `block` (from 0) begins a stage: load, reference, scale, forward, solve."""

    def block(self, result: BlockResult) -> None:
        """A block is quantized and saved."""

    def stop_requested(self) -> bool:
        """Whether the run should stop; called after every saved block. The run can be resumed."""


class NoProgress:
    """Ignores the progress."""

    def note(self, text: str) -> None:
        """Nothing."""

    def begin_blocks(self, blocks: int, done: int) -> None:
        """Nothing."""

    def stage(self, block: int, name: str) -> None:
        """Nothing."""

    def block(self, result: BlockResult) -> None:
        """Nothing."""

    def stop_requested(self) -> bool:
        """Never."""
        return False

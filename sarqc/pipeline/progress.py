"""Whoever wants to follow a run, as the run sees him."""

from __future__ import annotations

from typing import Protocol

from sarqc.pipeline.driver import BlockResult


class Progress(Protocol):
    """All methods are called from the thread that runs the job."""

    def note(self, text: str) -> None:
        """Something worth one line: what was chosen, what is being read."""

    def begin_blocks(self, blocks: int, done: int) -> None:
        """The blocks start; there are so many, and the first `done` of them were finished by an earlier run."""

    def stage(self, block: int, name: str) -> None:
        """Block number `block` (from 0) begins a stage: load, reference, scale, forward, solve."""

    def block(self, result: BlockResult) -> None:
        """A block is solved and saved."""

    def stop_requested(self) -> bool:
        """Asked after every saved block: whether the run shall end here, to be continued another time."""


class NoProgress:
    """The watcher that looks away."""

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

"""Runs that are asked to stop."""

from __future__ import annotations

from sarqc.pipeline.driver import BlockResult
from sarqc.pipeline.progress import NoProgress


class Stopping(NoProgress):
    """Stops after `after` blocks, and keeps what it is given."""

    def __init__(self, after: int = 99) -> None:
        self.left = after
        self.notes: list[str] = []
        self.done: int | None = None
        self.solved: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin_blocks(self, blocks: int, done: int) -> None:
        self.done = done

    def block(self, result: BlockResult) -> None:
        self.solved.append(result.index)
        self.left -= 1

    def stop_requested(self) -> bool:
        return self.left <= 0

"""Progress of a run: a bar with the time left on a terminal, plain lines anywhere else.

Everything here goes to stderr, so that stdout holds results alone.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

from sarqc.cli.options import print_line, stderr
from sarqc.contexts import Closing

if TYPE_CHECKING:
    from sarqc.pipeline.driver import BlockResult

QUIET_SECONDS = 5.0
"""Least time between two plain lines where there is no terminal to redraw."""

BAR = 24
"""Columns of a bar: its line fits 80 columns with room behind for the ^C that terminals echo, which would break it."""


class Ticker(Closing):
    """One task of known length; `advance` moves it on. A context manager.

    Texts are shown as they are: names and paths come from files, and brackets in them are no markup.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._label = ""
        self._total = 0
        self._done = self._before = 0
        self._began = self._printed = 0.0

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar:
            self._bar.stop()

    def begin(self, label: str, total: int, done: int = 0) -> None:
        """Start counting to `total`; `done` steps were made earlier and say nothing about the time left."""
        self._label, self._total, self._done, self._before = label, total, done, done
        self._began = self._printed = time.monotonic()
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(BAR),
                MofNCompleteColumn(),
                TextColumn("[dim]{task.fields[detail]}[/]"),
                TimeElapsedColumn(),
                TextColumn("[dim]left[/]"),
                TimeLeftColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task(label, total=total, completed=done, detail="")
            self._bar.start()

    def detail(self, text: str) -> None:
        """What is going on inside the step, shown where a line can be redrawn."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, detail=escape(text))

    def advance(self, text: str) -> None:
        """One step is done; `text` says how it went."""
        self._done += 1
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, detail=escape(text))
            return
        now = time.monotonic()
        if now - self._printed >= QUIET_SECONDS or self._done == self._total:
            self._printed = now
            left = (now - self._began) / (self._done - self._before) * (self._total - self._done)
            self.note(f"{self._label} {self._done}/{self._total}: {text}, {_duration(left)} left")

    def note(self, text: str) -> None:
        """One line."""
        with suppress(OSError):  # a full disk under `2> log` is no reason to end a run
            print_line(self.console, text)

    def follow(self, label: str) -> Callable[[int, int, str], None]:
        """A function of (done, total, text) that moves this on."""

        def step(done: int, total: int, text: str) -> None:
            if done == 1:
                self.begin(label, total)
            self.advance(text)

        return step


class RunProgress(Ticker):
    """Shows a run or a comparison. The first Ctrl-C stops it after the step at work, the second at once."""

    _asked = False

    def __enter__(self) -> Self:
        self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return super().__enter__()

    def close(self) -> None:
        """Give Ctrl-C back its meaning, and take the bar off the terminal."""
        signal.signal(signal.SIGINT, self._handler)
        super().close()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._asked or not self._before <= self._done < self._total:
            raise KeyboardInterrupt
        self._asked = True
        self.note("finishing this step, then saving and stopping; Ctrl-C again stops at once")

    def stop_requested(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._asked

    def begin_blocks(self, blocks: int, done: int) -> None:
        """The blocks start."""
        self.begin("blocks", blocks, done)

    def stage(self, block: int, name: str) -> None:
        """A block begins a stage."""
        self.detail(name)

    def block(self, result: BlockResult) -> None:
        """A block is solved: its output error beside that of RTN."""
        errors = [report.error for report in result.reports]
        plain = [report.rtn_error for report in result.reports]
        self.advance(f"error {_percent(errors)} (RTN {_percent(plain)})")
        for report in result.reports:
            if report.fallback:
                self.note(f"{report.site}: {report.fallback}")


def progress_bar() -> RunProgress:
    """A progress bar on stderr; plain lines where stderr is not a terminal.

        with sarqc.progress_bar() as progress:
            sarqc.quantize(model, out, progress=progress)

    Within the context Ctrl-C stops a run after the block at work, and a comparison after the cell at work.

    Returns:
        What `progress` of `quantize` and `compare` takes.
    """
    return RunProgress(stderr())


def _percent(values: list[float]) -> str:
    return f"{sum(values) / max(len(values), 1):.2%}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

"""A progress bar for Python."""

from __future__ import annotations

from sarqc.cli.options import stderr
from sarqc.cli.terminal import RunProgress


def progress_bar() -> RunProgress:
    """A progress bar on stderr; plain lines where stderr is not a terminal.

        with sarqc.progress_bar() as progress:
            sarqc.quantize(model, out, progress=progress)

    Within the context Ctrl-C stops the run after the block at work.

    Returns:
        What `progress` of `quantize` and `compare` takes.
    """
    return RunProgress(stderr())

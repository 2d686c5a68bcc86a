"""What a terminal shows while a command imports what it needs."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from sarqc.cli import options


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_says_what_it_waits_for(monkeypatch, terminal):
    """Importing torch and transformers takes seconds; a file or a pipe is told nothing."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=80)
    monkeypatch.setattr(options, "stderr", lambda: console)
    with options.loading():
        time.sleep(0.2)
    assert ("loading torch and transformers" in shown.getvalue()) == terminal

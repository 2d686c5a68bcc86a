"""The command line in this process, as a fixture, and in a child of it."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import sarqc
from sarqc import cli
from sarqc.entrypoints import compare, evaluate, generate, inspect, quantize  # noqa: F401  # a child finds them imported


@pytest.fixture
def door(monkeypatch, capsys, outcomes) -> Callable[..., tuple[int, str]]:
    """door(command, ...) -> exit code and the last line on stderr; what is no SarqcError comes out as it is.

    Counted as an outcome: a refusal (2), problems that `verify` found (1), the command's result (0).
    """

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["sarqc", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        last = lines[-1] if lines else ""
        assert ended.value.code in (0, 1, 2)
        assert ended.value.code != 2 or last.startswith("sarqc: "), last
        assert ended.value.code != 2 or not arguments or "Usage:" not in captured.out, (
            "a line is lost behind a page of help"
        )
        assert "Traceback" not in last and "\x1b" not in last
        if ended.value.code:
            outcomes.clear_error(last if ended.value.code == 2 else captured.out.splitlines()[0])
        else:
            outcomes.still_valid()
        return int(ended.value.code), last

    return run


def in_child(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own with files as its stdout and stderr, without the seconds in which a fresh one
    imports torch and transformers.

    It is forked from a server that only imported them: a fork of this process would wait for ever at its first
    parallel loop if an OpenMP pool ran here before.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    command = ["sarqc", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        child = context.Process(target=_command, args=(command, dict(os.environ), *files))
        child.start()
        child.join()
        texts = [file.read_text() for file in files]
    assert child.exitcode is not None
    return subprocess.CompletedProcess(command, child.exitcode, *texts)


def _command(command: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    """What the child does; its exit code is the command's."""
    os.environ.clear()
    os.environ.update(environment)
    for file, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1) for descriptor in (1, 2))  # noqa: SIM115, PTH123
    sys.argv = command
    sarqc.register()
    cli.main()

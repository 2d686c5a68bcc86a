"""The command line in this process, as a fixture, and in a child of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable

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
    """A command in a forked child with files as its stdout and stderr: a process of its own, without the seconds in
    which a fresh one imports torch and transformers."""
    command = ["sarqc", *map(str, arguments)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush(), sys.stderr.flush()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
                sys.argv = command
                sarqc.register()
                cli.main()
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            except BaseException:  # noqa: BLE001  # it must not go on into the tests that its parent runs
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(command, code, *texts)

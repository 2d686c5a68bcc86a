"""The command line in this process, as a fixture."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from sarqc import cli


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

"""Help on a terminal of 80 columns: whole words, every option, long lists in panels; the version."""

from __future__ import annotations

import sys

import pytest
from typer.main import get_command

import sarqc
from sarqc import cli
from sarqc.cli.layout import LONG, PANELS

PARAMS = {name: command.params for name, command in get_command(cli.app).commands.items()}


def said(monkeypatch, capsys, *arguments: str) -> str:
    """What stdout shows of a command that ends well."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["sarqc", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert (ended.value.code, shown.err) == (0, "")
    return shown.out


@pytest.mark.parametrize("name", PARAMS)
def test_help_fits_80_columns_with_no_word_cut_off(name, monkeypatch, capsys):
    shown = said(monkeypatch, capsys, name, "--help")
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    for param in PARAMS[name]:
        for option in (*param.opts, *param.secondary_opts):
            assert not option.startswith("--") or option in shown.split(), option
    assert ("Calibration text ─" in shown) == (len(PARAMS[name]) >= LONG)


def test_a_panel_is_for_options_that_exist():
    assert PANELS.keys() <= {param.name for name in ("quantize", "compare") for param in PARAMS[name]}


def test_the_version(monkeypatch, capsys):
    assert said(monkeypatch, capsys, "--version") == f"sarqc {sarqc.__version__}\n"

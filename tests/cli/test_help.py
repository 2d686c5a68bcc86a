"""Help on a terminal of 80 columns: whole words, every option, long lists in panels; the version."""

from __future__ import annotations

import sys

import pytest
from typer.main import get_command

import sarqc
from sarqc import cli
from sarqc.config import QUANTIZE
from sarqc.config_compare import COMPARE, EVALUATE
from sarqc.options import options

PARAMS = {name: command.params for name, command in getattr(get_command(cli.app), "commands").items()}  # noqa: B009


def output(monkeypatch, capsys, *arguments: str) -> str:
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
    shown = output(monkeypatch, capsys, name, "--help")
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    for param in PARAMS[name]:
        for option in (*param.opts, *param.secondary_opts):
            assert not option.startswith("--") or option in shown.split(), option
    assert output(monkeypatch, capsys, name, "-h") == shown
    assert ("─ Calibration ─" in shown) == (name in ("quantize", "compare"))


@pytest.mark.parametrize(("name", "kinds"), [("quantize", QUANTIZE), ("compare", COMPARE), ("eval", EVALUATE)])
def test_every_option_is_a_flag_with_its_help(name, kinds, monkeypatch, capsys):
    """In the order of the fields, and none of an earlier name."""
    shown = " ".join(output(monkeypatch, capsys, name, "--help").replace("│", " ").split())
    params = [param.name for param in PARAMS[name]]
    fields = [field for kind in kinds for field in options(kind)]
    assert [param for param in params if param in fields] == fields
    for kind in kinds:
        assert f"─ {kind.panel} ─" in shown
        for one in options(kind).values():
            assert one.help.split()[0] in shown
            assert not any(f"--{old.replace('_', '-')} " in shown for old in (*one.old, *one.old_opposite))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--strength", "0.3", "--bits", "9"), "--strength is now --reg-lambda"),
        (("--restart", "--bits", "9"), "--restart is now --no-resume"),
        (("--no-carry-error", "--bits", "9"), "--no-carry-error is now --no-error-correction"),
        (("--method", "sarqc", "--seed", "-1"), "method sarqc is now sarqc-awq-gptq"),
        (("--keep-work", "--bits", "9"), "keep_work has no effect"),
    ],
)
def test_an_earlier_flag_is_one_line_that_names_the_new_one(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sarqc", "quantize", "smollm2", "-o", "nowhere", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    first, last = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and first.startswith(f"sarqc: {message}")
    assert last.startswith(("sarqc: bits = 9", "sarqc: seed = -1"))


def test_the_version(monkeypatch, capsys):
    assert output(monkeypatch, capsys, "--version") == f"sarqc {sarqc.__version__}\n"


def test_a_removed_command_names_what_serves_now(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sarqc", "export", "work"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "sarqc convert" in capsys.readouterr().err

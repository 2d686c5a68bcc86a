"""The pages match the program: commands, options, modules, files and error classes exist; pictures are what is drawn.

Sentences are free: no test here holds wording.
"""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from benchmarks.readme import ROOT
from docs.draw import PICTURES
from sarqc import errors
from sarqc.cli import app

FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
TROUBLESHOOTING = PAGES["docs/troubleshooting.md"]
COMMANDS: dict[str, Any] = getattr(get_command(app), "commands")  # noqa: B009 - typer's type does not say it
OTHER_TOOLS = {
    "--minutes", "--no-deps", "--model-path", "--help", "--nproc-per-node", "--rival", "--dist", "--case", "--set",
    "--model", "--calibration", "--evaluation", "--eval-windows", "--commit", "--out", "--skip-tests", "--context",
    "--shape",
}  # fmt: skip
"""Options in the pages that are of other programs."""


def options(command: Any) -> set[str]:
    """Every spelling of a command's options."""
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


ALL_OPTIONS = {name for command in COMMANDS.values() for name in options(command)}


def shown_commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every `sarqc ...` line in the pages' code."""
    items = []
    for page, text in PAGES.items():
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            for line in [] if language else block.splitlines():
                command = re.match(r"(?:[A-Z_]+=\w+ |torchrun .* -m )?sarqc (.*)", line)
                if command:
                    items.append((page, shlex.split(command[1], comments=True)))
    return items


@pytest.mark.parametrize(("page", "words"), shown_commands(), ids=lambda value: " ".join(value)[:50])
def test_a_command_in_the_pages_exists_with_its_options(page, words):
    assert words[0] in COMMANDS, f"{page}: there is no command {words[0]!r}"
    for word in words[1:]:
        if word.startswith("-"):
            assert word in options(COMMANDS[words[0]]), f"{page}: {words[0]} has no option {word}"


@pytest.mark.parametrize("page", PAGES)
def test_options_in_prose_exist(page):
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGES[page]):
        assert option in ALL_OPTIONS | OTHER_TOOLS, f"no command has {option}"


def test_each_class_of_errors_has_a_section():
    sections = set(re.findall(r"^## (\w+)$", TROUBLESHOOTING, re.MULTILINE))
    assert sections == {name for name in errors.__all__ if name[0].isupper()} - {"SarqcError"}


def test_arguments_in_troubleshooting_are_options_or_torchruns():
    section = re.search(r"^## ArgumentError\n(.*?)^## ", TROUBLESHOOTING, re.DOTALL | re.MULTILINE)
    assert section is not None
    rows = re.findall(r"^\| (`[^|]+`) \|", section[1], re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(names) > 10
    for name in names:
        assert f"--{name.replace('_', '-')}" in ALL_OPTIONS | {"--WORLD-SIZE", "--RANK"}, name


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_files_in_the_pages_exist(page):
    text = PAGES[page]
    for module in re.findall(r"(?:`|::: )(sarqc(?:_kernels)?(?:\.\w+)+)", text):
        assert resolves(module), f"there is no {module}"
    for path in re.findall(r"`((?:sarqc|sarqc_kernels|csrc|docs|tests|benchmarks|examples)/[\w./-]+\.\w+)`", text):
        assert "NAME" in path or (ROOT / path).exists(), f"there is no {path}"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            result: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            result = getattr(result, part, None)
        return result is not None
    return False


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_its_script_draws(name):
    path = ROOT / "docs" / "img" / f"{name}.svg"
    assert path.read_text(encoding="utf-8") == PICTURES[name](), "python -m docs.draw"
    assert any(f"img/{name}.svg" in text for text in PAGES.values())


def test_every_page_is_in_the_menu():
    menu = str(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    for path in (ROOT / "docs").rglob("*.md"):
        assert f"'{path.relative_to(ROOT / 'docs')}'" in menu


@pytest.mark.parametrize("page", PAGES)
def test_links_between_files_lead_to_files(page):
    """The site checks its own links; here those that somebody follows in the repository."""
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", PAGES[page]):
        assert (ROOT / Path(page).parent / target).exists(), target


def test_the_layer_without_a_model_runs_as_it_stands(capsys):
    code = next(c for c in re.findall(r"```python\n(.*?)```", PAGES["docs/python.md"], re.DOTALL) if "solve_site" in c)
    exec(compile(code, "docs/python.md", "exec"), {})
    shape, error, rtn_error = re.fullmatch(r"torch.Size\((.*)\) (\S+) (\S+)\n", capsys.readouterr().out).groups()
    assert shape == "[1, 256, 512]" and float(error) < float(rtn_error)


def test_examples_are_pulled_in_not_quoted():
    """Every example stands in the page on Python, by the mark that the snippets extension replaces."""
    shown = set(re.findall(r'^--8<-- "examples/(\w+)\.py"$', PAGES["docs/python.md"], re.MULTILINE))
    assert shown == {path.stem for path in (ROOT / "examples").glob("*.py")} - {"demo"}


def test_the_site_refuses_what_it_must_not_hold(tmp_path):
    from docs.check import problems

    good = '<h1 id="top"></h1><a href="#top">x</a><img src="a.svg" alt="what"><a href="https://elsewhere">y</a>'
    (tmp_path / "index.html").write_text(good)
    (tmp_path / "a.svg").write_text("<svg/>")
    assert problems(tmp_path) == []
    bad = {
        "another host": '<script src="https://cdn/x.js"></script>',
        "no anchor": '<a href="index.html#nowhere">x</a>',
        "no target": '<a href="gone.html">x</a>',
        "no description": '<img src="a.svg">',
        "not MathML": '<span class="arithmatex">\\(x\\)</span>',
    }
    for reason, html in bad.items():
        (tmp_path / "page.html").write_text(html)
        assert [reason in problem for problem in problems(tmp_path)] == [True]

"""The pages say what is so: messages exist, commands and options exist, pictures are what their script draws."""

from __future__ import annotations

import ast
import re
import shlex

import pytest
import yaml
from typer.main import get_command

from benchmarks.readme import ROOT
from docs.draw import PICTURES
from sarqc import errors
from sarqc.cli import app

PAGES = {
    path.stem: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
SOURCES = [path for package in ("sarqc", "sarqc_kernels") for path in sorted((ROOT / package).rglob("*.py"))]
FAMILIES = {name for name in errors.__all__ if isinstance(getattr(errors, name), type) and name != "SarqcError"}
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGES["troubleshooting"], re.DOTALL | re.MULTILINE))
QUOTED = [(family, said) for family in SECTIONS for said in re.findall(r"^\| `([^`]+)` \|", SECTIONS[family], re.M)]


def template(node: ast.expr) -> str:
    """A message as the source has it, with … for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else "…"


@pytest.fixture(scope="module")
def raised() -> set[tuple[str, str]]:
    """(family, message) of every error that is raised anywhere in the two packages."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                family = ast.unparse(node.exc.func).rpartition(".")[2]
                found.add((family, template(node.exc.args[0])))
    return found


def test_every_family_of_errors_has_a_section():
    assert set(SECTIONS) == FAMILIES


@pytest.mark.parametrize(("family", "said"), QUOTED)
def test_a_quoted_message_is_raised(family, said, raised):
    assert any(said in message for kind, message in raised if kind == family), f"no {family} says {said!r}"


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every `sarqc ...` line in the pages' code."""
    found = []
    for page, text in PAGES.items():
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            for line in [] if language else block.splitlines():
                command = re.match(r"(?:[A-Z_]+=\w+ |torchrun .* -m )?sarqc (.*)", line)
                if command:
                    found.append((page, shlex.split(command[1], comments=True)))
    return found


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda value: " ".join(value)[:50])
def test_a_command_in_the_pages_exists_with_its_options(page, words):
    known = get_command(app).commands
    assert words[0] in known, f"{page}: there is no command {words[0]!r}"
    options = {name for each in known[words[0]].params for name in (*each.opts, *each.secondary_opts)}
    for word in words[1:]:
        assert not word.startswith("-") or word in options, f"{page}: {words[0]} has no option {word}"


def test_options_in_prose_exist():
    known = get_command(app).commands.values()
    options = {name for each in known for one in each.params for name in (*one.opts, *one.secondary_opts)}
    tools = {"--minutes", "--no-deps", "--model-path", "--help", "--nproc-per-node", "--rival"}  # of other programs
    for page, text in PAGES.items():
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
            assert option in options | tools, f"{page}: no command has {option}"


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_its_script_draws(name):
    path = ROOT / "docs" / "img" / f"{name}.svg"
    assert path.read_text(encoding="utf-8") == PICTURES[name](), "python -m docs.draw"
    assert any(f"img/{name}.svg" in text for text in PAGES.values())


def test_every_page_is_in_the_menu():
    menu = str(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    for path in (ROOT / "docs").rglob("*.md"):
        assert f"'{path.relative_to(ROOT / 'docs')}'" in menu


def test_the_layer_that_stands_alone_runs_as_it_stands(capsys):
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", PAGES["python"], re.DOTALL) if "solve_site" in block
    )
    exec(compile(code, "docs/python.md", "exec"), {})
    shape, error, rounding = re.fullmatch(r"torch.Size\((.*)\) (\S+) (\S+)\n", capsys.readouterr().out).groups()
    assert shape == "[1, 256, 512]" and float(error) < float(rounding)


def test_examples_are_pulled_in_not_quoted():
    """Every example stands in the page on Python, by the mark that the snippets extension replaces."""
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    shown = set(re.findall(r'^--8<-- "examples/(\w+)\.py"$', page, re.MULTILINE))
    assert shown == {path.stem for path in (ROOT / "examples").glob("*.py")} - {"demo"}

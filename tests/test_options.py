"""An option is a field: what follows from one is held here, with options that exist only in this file."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest
import typer
from typer.testing import CliRunner

from sarqc import kinds
from sarqc.cli.flags import ConfigOption, OptionCommand, with_options
from sarqc.errors import ArgumentError
from sarqc.options import (
    Config,
    RenamedWarning,
    arguments,
    command_words,
    documented,
    from_record,
    may_change,
    option,
    options,
    record,
    same,
    split_by_config,
)
from sarqc.quant_config import QuantConfig


@dataclass(frozen=True)
class Colours(Config):
    panel: ClassVar[str] = "Colours"
    removed: ClassVar[dict[str, str]] = {"gloss": "use paint"}

    hue: int = option(120, kinds.whole(0, 359), "Angle.", old=("tint",))
    name: str | None = option(None, kinds.text("a word"), "Name.")
    size: int = option(2_000_000_000, kinds.size_in_bytes(1), "Space.", resume="free")
    light: float | str = option("auto", kinds.auto_or(kinds.number(0, 1)), "Light.", resume="derived")
    matt: bool = option(True, kinds.switch(), "Matt.", old_opposite=("glossy",))
    layers: tuple[int, ...] = option((), kinds.several(kinds.whole(1)), "Layers.")
    skip: tuple[str, ...] = option((), kinds.several(kinds.regex(), repeated=True), "Skip.")


def application() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @with_options(Colours)
    def paint(
        wall: str, given: dict[str, Any], thick: Annotated[int, typer.Option()] = 1, config: ConfigOption = None
    ) -> None:
        print(wall, thick, Colours.made(None, split_by_config((Colours,), given)[Colours]))

    app.command(cls=OptionCommand)(paint)
    return app


def run(*words: str) -> str:
    """What the command prints; an error is raised."""
    done = CliRunner().invoke(application(), words)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


# -- a new option is two lines --------------------------------------------------------------------------------------


def test_a_new_option_is_its_field_and_its_use(tmp_path):
    """One field; the flag, the file, the keyword, the signature, help, record and command follow."""

    @dataclass(frozen=True)
    class More(Colours):
        coats: int = option(1, kinds.whole(1, 9), "Coats of paint.")  # the first line

    app = typer.Typer(pretty_exceptions_enable=False)

    @with_options(More)
    def paint(given: dict[str, Any], config: ConfigOption = None) -> None:
        print("coats:", More.made(None, split_by_config((More,), given)[More]).coats)  # the second

    app.command(cls=OptionCommand)(paint)
    file = tmp_path / "paint.yaml"
    file.write_text("coats: 4\n")
    for words, coats in ((["--coats", "3"], 3), (["--config", str(file)], 4), ([], 1)):
        assert f"coats: {coats}" in CliRunner().invoke(app, words).output
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "--coats" in shown and "Coats of paint" in shown and "Colours" in shown

    @documented(More)
    def python(wall: str, **given: Any) -> None:
        """Paint.

        Args:
            wall: Which.
            {options}
        """

    assert inspect.signature(python).parameters["coats"].default == 1
    assert "coats: Coats of paint. Default: 1." in (python.__doc__ or "")
    assert record(More(coats=2))["coats"] == 2
    assert command_words(More, {"coats": 2}) == ["--coats", "2"]


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"hue": 360}, "hue = 360"),
        ({"hue": True}, "hue = True"),
        ({"hue": "red"}, "hue = 'red'"),
        ({"hue": 1.5}, "hue = 1.5"),
        ({"hue": None}, "hue = None"),
        ({"name": ""}, "name = ''"),
        ({"name": 3}, "name = 3"),
        ({"size": 0}, "size = 0"),
        ({"light": "bright"}, "light = 'bright'"),
        ({"light": float("nan")}, "light = nan"),
        ({"matt": "yes"}, "matt = 'yes'"),
        ({"matt": 1}, "matt = 1"),
        ({"layers": [1, 0]}, "layers = "),
        ({"layers": {}}, ""),
        ({"skip": "("}, "skip = '\\('"),
        ({"skip": [3]}, "skip = "),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_argument(given, name):
    if not name:
        assert Colours(**given).layers == ()
        return
    with pytest.raises(ArgumentError, match=rf"^{name}.*use "):
        Colours(**given)


def test_one_value_alone_is_a_list_of_it():
    assert Colours(layers=3).layers == (3,) and Colours(skip="down_proj").skip == ("down_proj",)


# -- keywords -----------------------------------------------------------------------------------------------------


def test_keywords_go_to_their_configuration():
    assert split_by_config((Colours,), {"hue": 3, "name": None}) == {Colours: {"hue": 3}}


def test_an_unknown_keyword_is_refused_with_the_nearest_name():
    with pytest.raises(ArgumentError, match="hues is not an option: did you mean hue"):
        split_by_config((Colours,), {"hues": 3})


def test_earlier_names_still_work_and_say_the_new_one():
    with pytest.warns(RenamedWarning, match="tint is now hue"):
        assert split_by_config((Colours,), {"tint": 3})[Colours] == {"hue": 3}
    with pytest.warns(RenamedWarning, match="glossy is now matt"):
        assert split_by_config((Colours,), {"glossy": True})[Colours] == {"matt": False}
    with pytest.warns(RenamedWarning, match="gloss has no effect"):
        assert split_by_config((Colours,), {"gloss": True})[Colours] == {}
    with pytest.warns(RenamedWarning), pytest.raises(ArgumentError, match="hue is given twice"):
        split_by_config((Colours,), {"tint": 3, "hue": 4})


def test_two_that_exclude_each_other_are_refused():
    with pytest.raises(ArgumentError, match=r"bits = 4 and avg_bits = 3.5 exclude each other"):
        QuantConfig.made(None, {"bits": 4, "avg_bits": 3.5})
    assert QuantConfig.made(QuantConfig(bits=4), {"avg_bits": 3.5}).bits == 4


def test_an_object_with_changes():
    assert Colours.made(Colours(hue=5), {"matt": False}) == Colours(hue=5, matt=False)
    assert Colours.made(Colours(hue=5), {}) == Colours(hue=5)
    with pytest.raises(ArgumentError, match="give a Colours"):
        Colours.made("red", {})  # type: ignore[type-var]


# -- records ----------------------------------------------------------------------------------------------------------


def test_a_record_holds_what_the_result_depends_on_and_reads_back():
    config = Colours(hue=3, layers=(1, 2), size=7, light=0.5)
    assert record(config) == {"hue": 3, "matt": True, "layers": [1, 2]}
    assert record(from_record(Colours, record(config))) == record(config)
    with pytest.raises(ArgumentError, match="Colours: hoe is not an option"):
        from_record(Colours, {"hoe": 3})


def test_what_a_resumed_run_may_change():
    assert may_change((Colours,)) == ("size",)


def test_a_command_says_what_is_not_the_default():
    config = Colours(hue=3, size=500_000_000, light=0.25, matt=False, layers=(1, 2), skip=("a", "b"))
    words = command_words(Colours, {name: getattr(config, name) for name in options(Colours)})
    assert words == (
        ["--hue", "3", "--size", "0.5", "--light", "0.25", "--no-matt", "--layers", "1,2", "--skip", "a", "--skip", "b"]
    )
    assert repr(config) in run("w", *words)  # and the command line reads them back
    assert command_words(Colours, {"hue": 3}, {"hue": 3}) == []


def test_help_has_the_default_in_the_units_of_the_command_line():
    assert "size: Space. In bytes. Default: 2 GB." in arguments((Colours,))


def test_an_option_of_another_configuration_is_that_option():
    @dataclass(frozen=True)
    class Other(Config):
        panel: ClassVar[str] = "Other"
        hue: int = same(Colours, "hue", help="Hue.")

    one = options(Other)["hue"]
    assert Other().hue == 120 and one.kind is options(Colours)["hue"].kind
    assert (one.help, one.panel) == ("Hue.", "Colours")


# -- command line and file ----------------------------------------------------------------------------------------


def test_flags():
    assert repr(Colours()) in run("w")
    assert "size=1500000000" in run("w", "--size", "1.5")
    assert "light='auto'" in run("w", "--light", "auto") and "light=0.5" in run("w", "--light=0.5")
    assert "skip=('a', 'b')" in run("w", "--skip", "a", "--skip", "b")


@pytest.mark.parametrize("words", [["--hue", "red"], ["--size", "nan"], ["--layers", "1,x"]])
def test_a_wrong_flag_is_the_same_error_as_in_python(words):
    with pytest.raises(ArgumentError, match=rf"^{words[0][2:]} = "):
        run("w", *words)


def test_earlier_flags_are_hidden_and_work():
    for words, result in (
        (["--tint", "9"], "hue=9"),
        (["--tint=9"], "hue=9"),
        (["--glossy"], "matt=False"),
        (["--gloss", "--hue", "4"], "hue=4"),
    ):
        with pytest.warns(RenamedWarning):
            assert result in run("w", *words)
    shown = run("--help")
    assert "tint" not in shown and "glossy" not in shown
    assert "--tint 1 Colours(" in run("--", "--tint")


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("hue: 9", "hue=9"),
        ("light: 0.5", "light=0.5"),
        ("light: auto", "light='auto'"),
        ("matt: false", "matt=False"),
        ("no-such: 1", "no-such is not an option"),
        ("hue: 9\nhue: 10", "hue is given twice"),
        ("hue: 9\ntint: 10", "hue is given twice"),
        ("hue: red", "hue = 'red'"),
        ("matt: perhaps", "matt = 'perhaps'"),
        ("hue: {a: 1}", "hue = "),
        ("layers: [1, 2]", "layers=(1, 2)"),
        ("layers: 1,2", "layers=(1, 2)"),
        ("skip: a", "skip=('a',)"),
        ("skip: [a, b]", "skip=('a', 'b')"),
        ("size: 0.5", "size=500000000"),
        ("thick: 3", "w 3 "),
        ("tint: 9", "hue=9"),
        ("- hue", "must hold option: value lines"),
        ("{", "cannot be read as YAML"),
    ],
)
@pytest.mark.filterwarnings("ignore::sarqc.options.RenamedWarning")
def test_a_file(text, result, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(text + "\n")
    try:
        shown = run("w", "--config", str(file))
    except ArgumentError as error:
        assert str(file) in str(error)
        shown = str(error)
    assert result in shown


def test_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("hue: 9\nmatt: false\n")
    assert "hue=5" in run("w", "--config", str(file), "--hue", "5")
    assert "matt=True" in run("w", "--matt", "--config", str(file))

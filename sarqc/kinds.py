"""Kinds of option values: what is accepted, and how a value is read from text and written as text.

A kind holds no name and no default; `sarqc.options.option` gives it those.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

AUTO: Literal["auto"] = "auto"
PRIOR: Literal["prior"] = "prior"
GB = 1_000_000_000

Form = Literal["value", "switch", "repeated"]


@dataclass(frozen=True)
class Kind:
    """Values of one kind.

    Attributes:
        accepted: What is accepted, for help and errors: "a whole number from 2 to 8".
        check: Returns the value to keep; raises `ValueError` or `TypeError` for anything else.
        parse: Reads a value from text; raises `ValueError`. Its result is checked afterwards.
        spell: Writes a value as the text that `parse` reads.
        metavar: What help shows in place of a value.
        form: Whether the command line takes one value, none (a switch), or a value each time.
        unit: Unit of a value in Python, where the command line has another one.
        json: A value as JSON has it.
    """

    accepted: str
    check: Callable[[Any], Any]
    parse: Callable[[str], Any]
    spell: Callable[[Any], str] = str
    metavar: str = "TEXT"
    form: Form = "value"
    unit: str = ""
    json: Callable[[Any], Any] = lambda value: value


def whole(least: int, most: int | None = None) -> Kind:
    """Whole numbers from `least` to `most`; a bool is none."""

    def check(value: Any) -> int:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
        if number < least or (most is not None and number > most):
            raise ValueError
        return number

    reach = f"from {least} up" if most is None else f"from {least} to {most}"
    return Kind(f"a whole number {reach}", check, int, metavar="INTEGER")


def number(least: float, most: float = math.inf, *, below: bool = False) -> Kind:
    """Finite numbers from `least` to `most`, or less than `most` where `below`."""

    def check(value: Any) -> float:
        if isinstance(value, bool | str):
            raise TypeError
        given = float(value)
        if not math.isfinite(given) or not least <= given <= most or (below and given == most):
            raise ValueError
        return given

    reach = "up" if most == math.inf else f"up to, but not including, {most:g}" if below else f"to {most:g}"
    return Kind(f"a number from {least:g} {reach}", check, float, _figure, "NUMBER")


def switch() -> Kind:
    """True or False."""

    def check(value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError
        return value

    def parse(text: str) -> bool:
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"

    return Kind("true or false", check, parse, lambda value: str(value).lower(), "", "switch")


def one_of(*words: str) -> Kind:
    """One of these words."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            raise ValueError
        return value

    return Kind(f"one of {', '.join(words)}", check, str, metavar="|".join(words))


def text(accepted: str, check: Callable[[str], object] | None = None) -> Kind:
    """Strings that are not empty and that `check`, which raises `ValueError`, lets pass."""

    def checked(value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise ValueError
        if check is not None:
            check(value)
        return value

    return Kind(accepted, checked, str)


def regex() -> Kind:
    """Regular expressions."""

    def compiled(value: str) -> None:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError from error

    return replace(text("a regular expression", compiled), metavar="REGEX")


def place() -> Kind:
    """Paths of files and folders, kept as strings."""

    def check(value: Any) -> str:
        path = os.fspath(value)
        if not isinstance(path, str) or not path:
            raise ValueError
        return path

    return Kind("a path", check, str, metavar="PATH")


def size_in_bytes(least: int) -> Kind:
    """Sizes: bytes in Python, GB on the command line and in YAML."""
    bytes_ = whole(least)

    def parse(value: str) -> int:
        given = float(value)
        if not 0 <= given < math.inf:
            raise ValueError
        return int(given * GB)

    return replace(
        bytes_,
        accepted=f"{bytes_.accepted} in bytes; on the command line and in YAML GB, like 4 or 0.5",
        parse=parse,
        spell=lambda value: _figure(value / GB),
        metavar="GB",
        unit="bytes",
    )


def auto_or(kind: Kind, *others: str) -> Kind:
    """The word "auto", one of the others, or a value of `kind`."""
    words = (AUTO, *others)

    def is_word(value: Any) -> bool:
        return isinstance(value, str) and value in words

    return replace(
        kind,
        accepted=f"{', '.join(map(repr, words))} or {kind.accepted}",
        check=lambda value: value if is_word(value) else kind.check(value),
        parse=lambda value: value if is_word(value) else kind.parse(value),
        spell=lambda value: value if is_word(value) else kind.spell(value),
        metavar="|".join([*words, kind.metavar]),
    )


def several(kind: Kind, *, repeated: bool = False) -> Kind:
    """Values of `kind`, kept as a tuple; one value alone is a tuple of it.

    On the command line they stand with commas between, or each behind its own flag where `repeated`.
    """

    def check(value: Any) -> tuple[Any, ...]:
        alone = isinstance(value, str) or not isinstance(value, Iterable)
        return tuple(kind.check(item) for item in ((value,) if alone else value))

    return replace(
        kind,
        accepted=f"a list, each {kind.accepted}",
        check=check,
        parse=lambda value: tuple(kind.parse(item.strip()) for item in value.split(",") if item.strip()),
        spell=lambda value: ",".join(map(kind.spell, value)),
        metavar=kind.metavar if repeated else f"{kind.metavar},...",
        form="repeated" if repeated else "value",
        json=list,
    )


def saliency_exponent(saliency: str) -> float | None:
    """Exponent A of diag(H)^A that a saliency stands for; None for "abs", which uses E|x_j| instead.

    Raises:
        ValueError: `saliency` is none of them.
    """
    named: dict[str, float | None] = {"iso": 0.0, "rms": 0.5, "energy": 1.0, "abs": None}
    if saliency in named:
        return named[saliency]
    power, colon, exponent = saliency.partition(":")
    if power != "power" or not colon:
        raise ValueError
    return float(number(0, 4).check(float(exponent)))


def group_size() -> Kind:
    """Inputs that share a scale."""
    least = whole(8)

    def check(value: Any) -> int:
        return -1 if value == -1 and not isinstance(value, bool) else int(least.check(value))

    accepted = "'auto', 32, 64 or 128 (any whole number from 8), or -1 for one scale per output row"
    return replace(auto_or(replace(least, check=check)), accepted=accepted)


def anything(accepted: str) -> Kind:
    """Any value but None, numbers and the empty string; what it holds is checked where it is read."""

    def check(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and not value):
            raise ValueError
        return value

    return Kind(accepted, check, str)


def dataset() -> Kind:
    """Calibration or evaluation data."""
    accepted = "a file, a data set NAME[:CONFIG[:SPLIT]], builtin, texts, chat messages or token ids"
    return replace(anything(accepted), metavar="FILE|NAME")


def _figure(value: float) -> str:
    """A number with no digit more than it needs."""
    return repr(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))

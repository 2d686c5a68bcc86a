"""An option exists once: as a dataclass field with its default, its check, its help and its flag.

`option` makes such a field, `Config` is the base of the dataclasses that have them. Everything else reads the fields:
command-line flags (`sarqc.cli.flags`), keywords of the Python functions, `--config` files, the fingerprint of a run,
and the command in a model card. Nothing here knows which options there are.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import reprlib
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar, cast

from sarqc.errors import ArgumentError
from sarqc.kinds import Kind

T = TypeVar("T")
C = TypeVar("C", bound="Config")
F = TypeVar("F", bound=Callable[..., Any])

Resume = Literal["fixed", "free", "derived"]
_KEY = "option"


class RenamedWarning(FutureWarning):
    """An option or a method was given by an earlier name, which still works in this minor version."""


@dataclass(frozen=True)
class Option:
    """What a field holds beside its type.

    Attributes:
        kind: The values it takes.
        help: One or two sentences, for `--help`, docstrings and pages.
        default_text: What stands for the default in help, where the value itself says too little.
        resume: Whether a resumed run may change it: "fixed" may not, because the result depends on it; "free" may;
            "derived" is fixed by what it resolves to (tokens, a dtype), which the fingerprint holds.
        flag: Spelling on the command line, where it is not the name with dashes.
        old: Earlier names.
        old_opposite: Earlier names of switches that meant the opposite.
        usual: The value that None stands for, where nothing else says otherwise.
        needs: What the rest of the configuration must offer for the option to have an effect.
        panel: Heading in help, where it is not that of its configuration.
    """

    kind: Kind
    help: str
    default_text: str | None = None
    resume: Resume = "fixed"
    flag: str | None = None
    old: tuple[str, ...] = ()
    old_opposite: tuple[str, ...] = ()
    usual: Any = None
    needs: str = ""
    panel: str = ""

    def keep(self, name: str, value: Any) -> Any:
        """The value as it is kept; `ArgumentError` naming the argument where it is not accepted."""
        try:
            return self.kind.check(value)
        except ArgumentError:
            raise
        except (ValueError, TypeError):
            raise refusal(name, value, self.kind.accepted) from None

    def takes(self, value: Any) -> bool:
        """Whether a value is accepted."""
        try:
            self.keep("", value)
        except ArgumentError:
            return False
        return True

    def read(self, name: str, text: str) -> Any:
        """The value that `text` of the command line or of a YAML file stands for."""
        try:
            value = self.kind.parse(text)
        except ValueError:
            raise refusal(name, text, self.kind.accepted) from None
        return self.keep(name, value)

    def flags(self, name: str) -> tuple[str, ...]:
        """What the command line calls it: one flag, or the pair that switches it on and off."""
        if self.flag is not None:
            return tuple(self.flag.split("/"))
        dashed = name.replace("_", "-")
        return (f"--{dashed}", f"--no-{dashed}") if self.kind.form == "switch" else (f"--{dashed}",)


def refusal(name: str, value: object, accepted: str) -> ArgumentError:
    """The error for a value that an argument does not take."""
    return ArgumentError(f"{name} = {reprlib.repr(value)} is not accepted: use {accepted}")


def option(default: T, kind: Kind, help: str, **rest: Any) -> T:
    """A dataclass field that is an option; `rest` are the other attributes of `Option`."""
    return dataclasses.field(default=default, metadata={_KEY: Option(kind, help, **rest)})


def same(kind: type[Config], name: str, **changes: Any) -> Any:
    """The option of another configuration; `changes` are attributes of `Option`."""
    one = dataclasses.replace(options(kind)[name], **({"panel": kind.panel} | changes))
    return dataclasses.field(default=default_of(kind, name), metadata={_KEY: one})


class Config:
    """Base of frozen dataclasses whose fields are options: checks every one when made.

    None stands for "not given" in a field whose default is None.
    """

    panel: ClassVar[str]
    """Heading of its options in help."""
    removed: ClassVar[Mapping[str, str]] = {}
    """Names of options that are gone -> what to do instead."""

    def __post_init__(self) -> None:
        for name, one in options(type(self)).items():
            value = getattr(self, name)
            if value is not None or default_of(type(self), name) is not None:
                object.__setattr__(self, name, one.keep(name, value))

    @classmethod
    def default_text(cls, name: str) -> str:
        """The default of the option `name` as help shows it."""
        one, default = options(cls)[name], default_of(cls, name)
        if one.default_text is not None:
            return one.default_text
        return "none" if default is None or default == () else shown(one, default)

    @classmethod
    def made(cls, base: Self | None, given: Mapping[str, Any]) -> Self:
        """`base` with the fields in `given` changed, or one made of `given` alone."""
        if base is None:
            return cls(**given)
        if not isinstance(base, cls):
            raise ArgumentError(f"{reprlib.repr(base)} is not accepted: give a {cls.__name__}")
        return dataclasses.replace(cast(Any, base), **given) if given else base


def options(kind: type[Config]) -> dict[str, Option]:
    """Name -> option, in the order of the fields."""
    fields = dataclasses.fields(cast(Any, kind))
    return {field.name: field.metadata[_KEY] for field in fields if _KEY in field.metadata}


def shown(one: Option, value: Any) -> str:
    """A value as help shows it."""
    if one.kind.form == "switch":
        return "on" if value else "off"
    return one.kind.spell(value) + (" GB" if one.kind.unit else "")


def default_of(kind: type[Config], name: str) -> Any:
    """The default of an option."""
    return next(field.default for field in dataclasses.fields(cast(Any, kind)) if field.name == name)


# -- from keywords ------------------------------------------------------------------------------------------------


def split_by_config(kinds: Iterable[type[Config]], given: Mapping[str, Any]) -> dict[type[Config], dict[str, Any]]:
    """Keywords by the configuration that they belong to; None as a value means "not given".

    Raises:
        ArgumentError: An unknown keyword, or one given under two names.
    """
    by_config: dict[type[Config], dict[str, Any]] = {kind: {} for kind in kinds}
    for word, value in given.items():
        if warn_removed(by_config, word):
            continue
        name, value = renamed(by_config, word, value)
        owner = next((kind for kind in by_config if name in options(kind)), None)
        if owner is None:
            raise unknown(word, [name for kind in by_config for name in options(kind)])
        if name in by_config[owner]:
            raise ArgumentError(f"{word} = {reprlib.repr(value)}: {name} is given twice; give it once")
        by_config[owner][name] = value
    return {kind: {name: value for name, value in one.items() if value is not None} for kind, one in by_config.items()}


def renamed(kinds: Iterable[type[Config]], word: str, value: Any) -> tuple[str, Any]:
    """The present name of an option and its value; warns where `word` is an earlier name."""
    for kind in kinds:
        for name, one in options(kind).items():
            if word in one.old:
                warn_renamed(word, name)
                return name, value
            if word in one.old_opposite:
                warn_renamed(word, name)
                return name, None if value is None else not value
    return word, value


def warn_removed(kinds: Iterable[type[Config]], word: str) -> bool:
    """Whether this option is gone; warns with what to do instead."""
    instead = next((kind.removed[word] for kind in kinds if word in kind.removed), None)
    if instead is not None:
        warnings.warn(f"{word} has no effect any more: {instead}", RenamedWarning, stacklevel=2)
    return instead is not None


def warn_renamed(old: str, new: str) -> None:
    """One line that names the new name."""
    warnings.warn(f"{old} is now {new}; the old name will be removed", RenamedWarning, stacklevel=2)


def unknown(word: object, known: Iterable[str], where: str = "") -> ArgumentError:
    """The error for an option that does not exist, with the nearest one that does."""
    names = sorted(known)
    near = difflib.get_close_matches(str(word), names, 1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
    return ArgumentError(f"{where}{word!s} is not an option: {hint}")


# -- to records, commands and texts ---------------------------------------------------------------------------------


def record(config: Config) -> dict[str, Any]:
    """The options that the result depends on, as JSON values. Unset ones are left out."""
    values = {}
    for name, one in options(type(config)).items():
        value = getattr(config, name)
        if one.resume == "fixed" and value is not None and value != ():
            values[name] = one.kind.json(value)
    return values


def from_record(kind: type[C], values: Mapping[str, Any]) -> C:
    """The configuration that `record` wrote.

    Raises:
        ArgumentError: A key that is no field of `kind`.
    """
    for key in values:
        if key not in options(kind):
            raise unknown(key, options(kind), f"{kind.__name__}: ")
    return kind(**values)


def may_change(kinds: Iterable[type[Config]]) -> tuple[str, ...]:
    """Names of the options that a resumed run may change."""
    return tuple(name for kind in kinds for name, one in options(kind).items() if one.resume == "free")


def command_words(kind: type[Config], values: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> list[str]:
    """Flags that stand for `values`, without those that are as in `base`, or as the defaults where that is None.

    Values that an option does not take are left out: they come from files that users edit.
    """
    words = []
    for name, one in options(kind).items():
        usual = default_of(kind, name) if base is None else base.get(name)
        value = values.get(name)
        if (
            value is None
            or not one.takes(value)
            or one.kind.json(value) == (usual if usual is None else one.kind.json(usual))
        ):
            continue
        flags = one.flags(name)
        if one.kind.form == "switch":
            words.append(flags[0] if value else flags[1])
        elif one.kind.form == "repeated":
            words += [word for item in value for word in (flags[0], str(item))]
        else:
            words += [flags[0], one.kind.spell(value)]
    return words


def arguments(kinds: Iterable[type[Config]], indent: str = "    ") -> str:
    """The options as lines of a Google-style `Args:` section."""
    lines = []
    for kind in kinds:
        for name, one in options(kind).items():
            unit = f" In {one.kind.unit}." if one.kind.unit else ""
            line = f"{name}: {one.help}{unit} Default: {kind.default_text(name)}."
            lines += textwrap.wrap(line, 116 - len(indent), initial_indent=indent, subsequent_indent=f"{indent}    ")
    return "\n".join(lines)


def described(kind: type[C]) -> type[C]:
    """Add the options of a configuration to its docstring, as attributes."""
    kind.__doc__ = f"{inspect.cleandoc(kind.__doc__ or '')}\n\nAttributes:\n{arguments([kind])}"
    return kind


def documented(*kinds: type[Config]) -> Callable[[F], F]:
    """Give a function with `**options` the signature and the docstring of these options.

    In the docstring a line `{options}` stands for their part of `Args:`.
    """

    def with_signature(function: F) -> F:
        shown = inspect.signature(function)
        own = [p for p in shown.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        names = {parameter.name for parameter in own}
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default_of(kind, name), annotation=type_)
            for kind in kinds
            for name, type_ in annotations_of(kind).items()
            if name not in names
        ]
        function.__signature__ = shown.replace(parameters=[*own, *more])  # type: ignore[attr-defined]  # for help()
        doc = inspect.cleandoc(function.__doc__ or "")
        function.__doc__ = doc.replace("    {options}", arguments(kinds))
        return function

    return with_signature


def with_alias(**names: str) -> Callable[[F], F]:
    """Let a function take these earlier names of its own parameters (earlier -> present), with a warning."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def with_keywords(*args: Any, **given: Any) -> Any:
            for old, new in names.items():
                if old in given:
                    warn_renamed(old, new)
                    given.setdefault(new, given.pop(old))
            return function(*args, **given)

        return cast(F, with_keywords)

    return decorate


def annotations_of(kind: type[Config]) -> dict[str, str]:
    """Name -> annotation of each option, as the source has it."""
    fields = dataclasses.fields(cast(Any, kind))
    return {field.name: str(field.type).replace("'", '"') for field in fields if _KEY in field.metadata}

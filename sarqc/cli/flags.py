"""Command-line flags and `--config` files from the fields of configurations.

    @with_options(QuantConfig, MethodConfig)
    def command(model: str, given: dict[str, Any], as_json: JsonOption = False) -> None: ...

The flags stand where `given` does. The command receives what was given, on the command line or in the file, under the
names of the fields.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from sarqc.errors import ArgumentError
from sarqc.options import Config, Option, options, renamed, unknown, warn_removed, warn_renamed

Command = Callable[..., None]
GIVEN, NO = "given", "no_"


def with_options(*kinds: type[Config]) -> Callable[[Command], Command]:
    """Give a command the flags of these configurations."""

    def decorate(command: Command) -> Command:
        named = {name: one for kind in kinds for name, one in options(kind).items()}

        @functools.wraps(command)
        def run(**values: Any) -> None:
            raw = {name: values.pop(name) for name in named}
            raw |= {name: False for name in named if values.pop(f"{NO}{name}", False)}
            given = {name: text for name, text in raw.items() if text is not None and text != []}
            command(**values, given={name: _read(name, named[name], text) for name, text in given.items()})

        hints, parameters = get_type_hints(command, include_extras=True), []
        for own in inspect.signature(command).parameters.values():
            if own.name == GIVEN:
                parameters += [one for kind in kinds for name in options(kind) for one in _parameters(kind, name)]
            else:
                parameters.append(own.replace(annotation=hints[own.name], kind=inspect.Parameter.KEYWORD_ONLY))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer reads
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        del run.__wrapped__
        run.kinds = kinds  # type: ignore[attr-defined]  # what `OptionCommand` reads
        return run

    return decorate


def _parameters(kind: type[Config], name: str) -> Iterator[inspect.Parameter]:
    """An option as a parameter that Typer makes a flag of. Its text is read later, so that errors are ours.

    The flag that turns a switch off is a parameter of its own, which help hides: as a pair they leave no room for text.
    """
    one = options(kind)[name]
    flags, help_text = one.flags(name), f"{one.help} Default: {kind.default_text(name)}."
    pair = len(flags) == 2 and flags[1] == f"--no-{flags[0][2:]}"
    if one.kind.form == "switch" and len(flags) == 1:
        help_text = one.help
    elif pair:
        help_text = f"{help_text} {flags[1]} turns it off."
    info = typer.Option(
        flags[0] if pair else "/".join(flags),
        help=help_text,
        metavar=one.kind.metavar,
        rich_help_panel=one.panel or kind.panel,
        show_default=False,
    )
    type_: Any = {"value": str | None, "switch": bool | None, "repeated": list[str] | None}[one.kind.form]
    yield _keyword(name, Annotated[type_, info], None)
    if pair:
        yield _keyword(f"{NO}{name}", Annotated[bool, typer.Option(flags[1], hidden=True)], False)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _read(name: str, one: Option, raw: Any) -> Any:
    """The value of what the command line holds."""
    if one.kind.form == "switch":
        return raw
    return one.keep(name, raw) if one.kind.form == "repeated" else one.read(name, raw)


class OptionCommand(TyperCommand):
    """A command that also takes the earlier names of its flags, unseen in help."""

    @property
    def kinds(self) -> tuple[type[Config], ...]:
        """The configurations given to `with_options`."""
        return getattr(self.callback, "kinds", ())

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Replace earlier names by the present ones, each with a warning."""
        return super().parse_args(ctx, present_names(self.kinds, args))


def plain_switches(group: TyperGroup) -> TyperGroup:
    """The same commands, with no type behind switches in help."""
    context = group.context_class(group, **group.context_settings)
    for command in (group, *group.commands.values()):
        for option in command.get_params(command.context_class(command, context)):  # `--help` is not in `params`
            if getattr(option, "is_flag", False):
                option.metavar = ""
    return group


def present_names(kinds: Iterable[type[Config]], words: Iterable[str]) -> list[str]:
    """A command line with the present names of flags; what stands behind `--` is left alone."""
    kinds, old, present = tuple(kinds), _old_flags(kinds), list[str]()
    left = iter(words)
    for word in left:
        if word == "--":
            return [*present, word, *left]
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and warn_removed(kinds, flag[2:].replace("-", "_")):
            continue
        if flag in old:
            warn_renamed(flag, old[flag])
            word = f"{old[flag]}{equals}{value}"
        present.append(word)
    return present


def _old_flags(kinds: Iterable[type[Config]]) -> dict[str, str]:
    """Earlier flag -> present flag."""
    renamed = {}
    for kind in kinds:
        for name, one in options(kind).items():
            flags = one.flags(name)
            for old in one.old:
                dashed = old.replace("_", "-")
                renamed[f"--{dashed}"] = flags[0]
                if one.kind.form == "switch":
                    renamed[f"--no-{dashed}"] = flags[1]
            renamed |= {f"--{old.replace('_', '-')}": flags[1] for old in one.old_opposite}
    return renamed


# -- --config ---------------------------------------------------------------------------------------------------------


def read_config(context: Any, path: Path | None) -> Path | None:
    """Take the options of a YAML file as defaults; what stands on the command line wins.

    Raises:
        ArgumentError: No YAML, an unknown key, one that is given twice, or a value that the option does not take.
    """
    if path is not None:
        context.default_map = _defaults(context.command, path, _load(path))
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(is_eager=True, callback=read_config, help="YAML file with any of these options. Flags override it."),
]


def _defaults(command: OptionCommand, path: Path, values: Mapping[Any, Any]) -> dict[str, Any]:
    """Parameter -> value as Typer takes it."""
    kinds = command.kinds
    ours = {name: one for kind in kinds for name, one in options(kind).items()}
    flags = {flag.lstrip("-").replace("-", "_"): name for name, one in ours.items() for flag in one.flags(name)[:1]}
    others = {
        word.lstrip("-").replace("-", "_"): param
        for param in command.params
        if param.name not in {"config", "help", *ours} and not getattr(param, "hidden", False)
        for word in param.opts
        if word.startswith("--") or word == param.name
    }
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        word, where = str(key).replace("-", "_"), f"--config {path}: "
        if warn_removed(kinds, word):
            continue
        name, value = renamed(kinds, flags.get(word, word), value)
        if name not in ours and name not in others:
            raise unknown(key, [*ours, *others], where)
        target = name if name in ours else str(others[name].name)
        if target in defaults:
            raise ArgumentError(f"{where}{target} is given twice: give it once")
        if name in ours:
            defaults[target] = _from_yaml(name, ours[name], value, where)
        else:
            defaults[target] = [value] if others[name].multiple and isinstance(value, str) else value
    return {name: value for name, value in defaults.items() if value is not None}


def _from_yaml(name: str, one: Option, value: Any, where: str) -> Any:
    """A value of a YAML file as the command line would hold it, once it is known to be accepted."""
    try:
        if value is None:
            return None
        if one.kind.form == "switch":
            return one.keep(name, value)
        if one.kind.form == "repeated":
            return list(one.keep(name, value))
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        one.read(name, text)
    except ArgumentError as error:
        raise ArgumentError(f"{where}{error}") from None
    return text


def _load(path: Path) -> Mapping[Any, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice, where YAML itself would take the last."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise ArgumentError(f"--config {path}: {twice} is given twice: give it once")
        return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=True))

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}
    except ArgumentError:
        raise
    except OSError as error:
        raise ArgumentError(f"--config {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError, TypeError, yaml.YAMLError) as error:
        raise ArgumentError(f"--config {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise ArgumentError(f"--config {path} must hold option: value lines, it holds a {type(values).__name__}")
    return values

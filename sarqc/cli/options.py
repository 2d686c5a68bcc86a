"""Options that several commands share, and how their answers are printed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

ModelArgument = Annotated[
    str, typer.Argument(help="Local folder, hub id (OWNER/NAME), or 'smollm2', the packaged one.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="Of activations: auto (the checkpoint's; float32 on a CPU where no weights are packed), float32, bfloat16 "
        "or float16."
    ),
]
ExpandedOption = Annotated[
    bool, typer.Option("--expanded", help="Expand quantized weights to dense ones first. Off: they stay packed.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
FormatOption = Annotated[
    str,
    typer.Option(
        help="compressed-tensors, gptq (v1 if symmetric, else v2), gptq_v2 or awq (gemm, 4 bits). "
        "The first is what vLLM, SGLang and transformers all read."
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output folder, once the new one is whole.")
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that comes with the model. Off: such models are refused."
    ),
]


def _values_from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take defaults of the other options from a YAML file; what stands on the command line wins."""
    if path is None:
        return None
    import yaml

    from sarqc.errors import ArgumentError

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ArgumentError(f"--config {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ArgumentError(f"--config {path} must hold option: value lines, it holds a {type(values).__name__}")
    known = {
        name: param
        for param in context.command.params
        if param.name not in {"config", "help"}
        for name in (one.lstrip("-").replace("-", "_") for one in (*param.opts, param.name or "") if one[:2] != "-o")
    }
    defaults = {}
    for key, value in values.items():
        param = known.get(str(key).replace("-", "_"))
        if param is None:
            raise ArgumentError(f"--config {path}: no option {key!r}; known are {', '.join(sorted(known))}")
        defaults[str(param.name)] = [value] if param.multiple and isinstance(value, str) else value
    context.default_map = defaults
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        is_eager=True, callback=_values_from_file, help="YAML file with any of these options; the command line wins."
    ),
]


def auto_or(kind: type[int] | type[float], name: str, value: str) -> Any:
    """`auto`, or `value` as a number; `ArgumentError` naming the option otherwise."""
    from sarqc.config import AUTO
    from sarqc.errors import ArgumentError

    if value == AUTO:
        return AUTO
    try:
        return kind(value)
    except ValueError:
        raise ArgumentError(f"{name} = {value!r} is not usable: use auto or a number") from None


def gigabytes(name: str, value: float) -> int:
    """GB as bytes; `ArgumentError` naming the option where that is no number of bytes. How few will do is not asked."""
    from sarqc.errors import ArgumentError

    if not 0 <= value < math.inf:
        raise ArgumentError(f"{name} = {value:g} GB is not usable: use a number like 4 or 0.5")
    return int(value * 1e9)


class _Aside(Console):
    """stderr; where nobody reads it any more (`2>&1 | head`, a closed terminal), the work goes on all the same."""

    def on_broken_pipe(self) -> None:
        """Say nothing from now on."""
        self.quiet = True


class _Results(Console):
    """stdout; where nobody reads it the command ends as other programs do."""

    def on_broken_pipe(self) -> None:
        """Leave it to `sarqc.cli.main`."""
        raise BrokenPipeError


def stdout() -> Console:
    """Where results go."""
    return _Results()


def stderr() -> Console:
    """Where progress goes, so that stdout holds results alone."""
    return _Aside(stderr=True)


def sentence(console: Console, text: str) -> None:
    """Print a line as it is: a terminal has it broken between words, a file or a pipe whole."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=not console.is_terminal)


def print_json(values: dict[str, Any]) -> None:
    """The result of a command for scripts; a number that is not finite, which JSON has no word for, becomes null."""
    print(json.dumps(_finite(values), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Options that several commands share, and how their answers are printed."""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sarqc.config import QuantConfig, RunConfig
from sarqc.options import options

ModelArgument = Annotated[
    str,
    typer.Argument(help="Local folder, hub id (OWNER/NAME or OWNER/NAME@REVISION), or 'smollm2', the packaged one."),
]
QuantizedArgument = Annotated[
    str, typer.Argument(help="Quantized checkpoint: local folder, or hub id (OWNER/NAME or OWNER/NAME@REVISION).")
]
DeviceOption = Annotated[str, typer.Option(help=options(RunConfig)["device"].help)]
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
FormatOption = Annotated[str, typer.Option(help=options(QuantConfig)["format"].help)]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help=options(RunConfig)["overwrite"].help)]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help=options(RunConfig)["trust_remote_code"].help)]


class _Console(Console):
    """stdout or stderr, either of which may be closed (`| head`, a closed terminal)."""

    def on_broken_pipe(self) -> None:
        """Without stdout the command ends, as `sarqc.cli.main` does it; without stderr it continues and is silent."""
        if not self.stderr:
            raise BrokenPipeError
        self.quiet = True


def stdout() -> Console:
    """Where results go."""
    return _Console()


def stderr() -> Console:
    """Where progress goes, so that stdout holds results alone."""
    return _Console(stderr=True)


def loading() -> AbstractContextManager[object]:
    """Says so on a terminal while torch and transformers are imported: that takes seconds, and is done in here."""
    console = stderr()
    return console.status("loading torch and transformers") if console.is_terminal else nullcontext()


def print_line(console: Console, text: str) -> None:
    """Print a line as it is: a terminal has it broken between words, a file or a pipe whole."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=not console.is_terminal)


def facts(title: str | None = None) -> Table:
    """A table of two columns, what and its value."""
    look: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "padding": (0, 2, 0, 0)}
    table = Table(title=title, show_header=False, box=None, **look)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def print_json(values: dict[str, Any]) -> None:
    """The result of a command for scripts; a number that is not finite, which JSON has no word for, becomes null."""
    print(json.dumps(_finite(values), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

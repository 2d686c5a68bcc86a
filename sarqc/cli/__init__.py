"""The door: commands, their help, progress, and errors as one line with exit code 2.

A command is a file here and a line in `COMMANDS`. Nothing heavy is imported until one runs, so that `--help` answers
at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

import typer

from sarqc.cli.chat import chat
from sarqc.cli.compare import compare
from sarqc.cli.convert import convert
from sarqc.cli.doctor import doctor
from sarqc.cli.evaluate import evaluate
from sarqc.cli.export import export
from sarqc.cli.generate import generate
from sarqc.cli.inspect import inspect
from sarqc.cli.quantize import quantize
from sarqc.cli.report import report
from sarqc.cli.verify import verify

COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize,
    "export": export,
    "eval": evaluate,
    "generate": generate,
    "chat": chat,
    "inspect": inspect,
    "verify": verify,
    "convert": convert,
    "doctor": doctor,
    "report": report,
    "compare": compare,
}

app = typer.Typer(
    name="sarqc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize language models to 2..8 bits with regularised calibration, and see what it cost.",
)
for _name, _command in COMMANDS.items():
    app.command(name=_name)(_command)


def main() -> NoReturn:
    """Run the command line; errors of the user become one line on stderr and exit code 2."""
    from sarqc.errors import Interrupted, SarqcError

    try:
        app(standalone_mode=True)
    except Interrupted as error:
        print(f"sarqc: {error}", file=sys.stderr)
        sys.exit(130)
    except SarqcError as error:
        print(f"sarqc: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)

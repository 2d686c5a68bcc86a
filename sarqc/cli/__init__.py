"""The door: commands, their help, progress, and errors as one line with exit code 2.

A command is a file here and a line in `COMMANDS`. Nothing heavy is imported until one runs, so that `--help` answers
at once.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import Annotated, NoReturn

import typer
from typer.main import get_group

from sarqc.cli.chat import chat
from sarqc.cli.compare import compare
from sarqc.cli.convert import convert
from sarqc.cli.doctor import doctor
from sarqc.cli.evaluate import evaluate
from sarqc.cli.flags import OptionCommand, plain_switches
from sarqc.cli.generate import generate
from sarqc.cli.inspect import inspect
from sarqc.cli.models import models
from sarqc.cli.push import push
from sarqc.cli.quantize import quantize
from sarqc.cli.report import report
from sarqc.cli.verify import verify
from sarqc.options import RenamedWarning

COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize,
    "eval": evaluate,
    "generate": generate,
    "chat": chat,
    "inspect": inspect,
    "verify": verify,
    "convert": convert,
    "push": push,
    "doctor": doctor,
    "report": report,
    "compare": compare,
    "models": models,
}

LESS = {
    "quantize": "a smaller --micro-batch or --gram-budget",
    "eval": "a smaller --seqlen",
    "generate": "a shorter --prompt or a smaller --max-new-tokens",
    "chat": "a smaller --max-new-tokens, or /reset sooner",
    "compare": "smaller --seqlen and --eval-seqlen",
}
"""What makes a command with a `--device` take less memory."""

_SHOW = warnings.showwarning

REMOVED = {"export": "`sarqc convert` writes a finished checkpoint in another format"}
"""Commands of earlier versions, and what serves now."""

app = typer.Typer(
    name="sarqc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from sarqc._version import __version__

        print(f"sarqc {__version__}")
        raise typer.Exit


@app.callback()
def _sarqc(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Quantize language models to 2..8 bits with regularised calibration, and measure the result."""


for _name, _command in COMMANDS.items():
    app.command(name=_name, cls=OptionCommand)(_command)


_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""What an option that does not exist or a value of another kind raises; click's, or that of the one inside typer."""


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What says how threads of OpenMP wait, of GNU's library and of Intel's."""
SPINS = 3000
"""How often an idle thread of GNU's OpenMP looks for work before it sleeps: some 150 microseconds, instead of several
milliseconds in which it keeps others from its core. `benchmarks.contention` measures what that saves.
"""


def set_wait_policy(environment: MutableMapping[str, str]) -> None:
    """Make idle threads leave their core soon, where nobody has said how they wait. torch's library reads that when it
    is loaded, so only the command line does this, in the process that is its own."""
    if not any(name in environment for name in WAITING):
        environment["GOMP_SPINCOUNT"] = str(SPINS)


def main() -> NoReturn:
    """Run the command line; errors of the user become one line on stderr and exit code 2."""
    set_wait_policy(os.environ)
    code = _run()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again when it ends, and say at length that it failed
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _run() -> int:
    """The exit code of the command in `sys.argv`: what it says, or that of what ended it."""
    from sarqc.errors import Interrupted, SarqcError

    warnings.showwarning = _warn
    command = plain_switches(get_group(app))
    try:
        with command.make_context("sarqc", sys.argv[1:]) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as end:
        return end.exit_code
    except KeyboardInterrupt:
        return 130
    except Interrupted as error:
        return _print_error(str(error), 130)
    except SarqcError as error:
        return _print_error(str(error))
    except _UsageError as error:
        return _print_error(_usage(error))
    except typer.Abort:
        return _print_error("stopped", 130)
    except BrokenPipeError:
        return 128 + signal.SIGPIPE  # `sarqc ... | head`: there is nobody to tell
    except (RuntimeError, MemoryError) as error:
        from sarqc.errors import out_of_memory  # torch is there by now, or this is no error of memory

        if not out_of_memory(error):
            raise
        return _print_error(_memory_advice(error))
    except OSError as error:
        where = "standard output" if error.filename is None else repr(os.fspath(error.filename))
        return _print_error(
            f"{where} cannot be used: {error.strerror or error}; give another place, or make room there"
        )


def _warn(message: Warning | str, category: type[Warning], *rest: object, **options: object) -> None:
    """A warning as one line, where it is about an earlier name; others as Python shows them."""
    if issubclass(category, RenamedWarning):
        _print_error(str(message))
    else:
        _SHOW(message, category, *rest, **options)  # type: ignore[arg-type]  # passed on as they came


def _usage(error: Exception) -> str:
    """What is wrong with a command line; where there is nothing on it, its help was printed instead."""
    context, message = getattr(error, "ctx", None), getattr(error, "format_message", lambda: str(error))()
    if not message:
        return f"no command: {', '.join(COMMANDS)} are known; `sarqc COMMAND --help` explains one"
    command = "sarqc" if context is None else context.command_path
    for old, new in REMOVED.items():
        if f"No such command {old!r}" in message:
            return f"`sarqc {old}` is gone: {new}"
    return f"{message.rstrip('.')}; `{command} --help` lists what there is"


def _memory_advice(error: Exception) -> str:
    """That memory ran out, and what the command in `sys.argv` could do with less of it."""
    command = next((word for word in sys.argv[1:] if word in COMMANDS), "")
    what = f"{LESS[command]}, or another --device" if command in LESS else "a machine with more"
    return f"{command}: out of memory ({str(error).partition(chr(10))[0] or 'of this machine'}); use {what}"


def _print_error(line: str, code: int = 2) -> int:
    with suppress(OSError):
        print(f"sarqc: {' '.join(line.split())}", file=sys.stderr)
    return code

"""`sarqc quantize`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sarqc.cli.flags import ConfigOption, with_options
from sarqc.cli.options import JsonOption, ModelArgument, loading, print_json, stderr, stdout
from sarqc.config import METHODS, QUANTIZE

if TYPE_CHECKING:
    from sarqc.report.result import Result


@with_options(*QUANTIZE)
def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist yet.")],
    given: dict[str, Any],
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show sizes, times and compatible runtimes; quantize nothing."),
    ] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model to a checkpoint that vLLM, SGLang and transformers load.

    Example: sarqc quantize Qwen/Qwen3-8B -o qwen3-8b-w4 --bits 4

    An interrupted run (Ctrl-C, a kill) resumes when the same command is run again.

    Several GPUs: torchrun --nproc-per-node N -m sarqc quantize ...
    """
    with loading():
        from sarqc.pipeline.distributed import is_leader

    if dry_run:
        if is_leader():
            estimate_run(model, output, given, as_json)
        return
    result = execute(model, output, given)
    if not is_leader():
        return
    if as_json:
        print_json({"out": str(result.out)} | result.report)
        return
    from sarqc.cli.summary import run_summary

    stdout().print(run_summary(result.out, result.report))


def execute(model: str, output: Path, given: dict[str, Any]) -> Result:
    """Run with a progress bar; Ctrl-C twice becomes the error that says how to resume."""
    from sarqc.cli.terminal import RunProgress
    from sarqc.entrypoints.quantize import quantize as run
    from sarqc.errors import Interrupted

    try:
        with RunProgress(stderr()) as progress:
            return run(model, output, progress=progress, **given)
    except KeyboardInterrupt:
        how = "stopped at once; finished blocks are saved, and the same command resumes from there"
        raise Interrupted(how) from None


def estimate_run(model: str, output: Path, given: dict[str, Any], as_json: bool) -> None:
    """Print the preflight; an error where the run could not begin."""
    from sarqc.checkpoint.folders import check_existing
    from sarqc.cli.preflight import show
    from sarqc.entrypoints.estimate import estimate

    check_existing(output.expanduser(), given.get("overwrite", False))
    preflight = estimate(model, output, **given)
    if as_json:
        print_json(preflight.to_json())
    else:
        show(stdout(), preflight)
    preflight.refuse()


# \b keeps the lines of a paragraph apart in the help.
quantize.__doc__ = "\n".join(
    [
        inspect.cleandoc(quantize.__doc__ or ""),
        "\n\b\nMethods:",
        *(f"  {name:<16}{method.about}" for name, method in METHODS.items()),
    ]
)

"""`sarqc quantize`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sarqc.cli.options import (
    ConfigOption,
    DeviceOption,
    DtypeOption,
    FormatOption,
    JsonOption,
    ModelArgument,
    OverwriteOption,
    TrustOption,
    auto_or,
    print_json,
    stderr,
)
from sarqc.spec import ABOUT, DEFAULT_METHOD


def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist yet.")],
    method: Annotated[str, typer.Option(help="One of the methods above.")] = DEFAULT_METHOD,
    bits: Annotated[int, typer.Option(help="2 to 8.")] = 4,
    group_size: Annotated[
        str,
        typer.Option(help="Inputs per scale: a number, -1 for a whole row, or auto: largest of 128, 64, 32 that fits."),
    ] = "auto",
    sym: Annotated[bool, typer.Option("--sym/--asym", help="One fixed zero, or a zero for each group.")] = True,
    strength: Annotated[
        str | None, typer.Option(help="Weight lambda of the regulariser: auto or a number. Default: the method's own.")
    ] = None,
    saliency: Annotated[
        str | None,
        typer.Option(
            help="What the regulariser is weighted with: iso, abs, rms, energy or power:A. Default: as strength."
        ),
    ] = None,
    calib: Annotated[
        str, typer.Option(help="Calibration text: a UTF-8 file, a data set NAME[:CONFIG[:SPLIT]], or builtin.")
    ] = "builtin",
    num_samples: Annotated[
        int | None, typer.Option(help="Windows of text to calibrate on. Default: up to 128, as many as the text has.")
    ] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window. Default: 2048.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of windows.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    micro_batch: Annotated[
        int | None, typer.Option(help="Windows at once. Default: as many as hold 1024 tokens on a CPU, 8192 on a GPU.")
    ] = None,
    gram_budget: Annotated[
        float, typer.Option(help="GB of Gram matrices at once; experts beyond it take further passes of the text.")
    ] = 17.0,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Regular expression; Linears it finds stay as they are. Repeatable.")
    ] = None,
    format: FormatOption = "compressed-tensors",
    tp: Annotated[
        int | None, typer.Option(help="Ranks that will serve the model: refuse what no server could split so.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for finished blocks. Default: a hidden one beside the output.")
    ] = None,
    keep_work: Annotated[
        bool, typer.Option("--keep-work", help="Keep the work folder, for `sarqc export` to another format.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin again instead of going on from the work folder.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would be done, what it takes and who would serve it; do nothing."),
    ] = False,
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model to a checkpoint that vLLM, SGLang and transformers read.

    Example: sarqc quantize Qwen/Qwen3-8B -o qwen3-8b-w4 --bits 4

    A run that was killed or stopped (Ctrl-C) goes on where it was when the same command is given again.
    """
    settings: dict[str, Any] = dict(
        method=method,
        bits=bits,
        group_size=auto_or(int, "group_size", group_size),
        sym=sym,
        strength=None if strength is None else auto_or(float, "strength", strength),
        saliency=saliency,
        calib=calib,
        num_samples=num_samples,
        seqlen=seqlen,
        seed=seed,
        device=device,
        dtype=dtype,
        micro_batch=micro_batch,
        gram_budget=int(gram_budget * 1e9),
        ignore=tuple(ignore or ()),
        format=format,
        tp=tp,
        trust_remote_code=trust_remote_code,
        work=work,
    )
    if dry_run:
        look_ahead(model, output, settings, as_json)
        return
    from sarqc.cli.terminal import RunWatcher
    from sarqc.errors import Interrupted
    from sarqc.job.run import quantize as run

    try:
        with RunWatcher(stderr()) as watcher:
            result = run(
                model, output, **settings, keep_work=keep_work, restart=restart, overwrite=overwrite, watcher=watcher
            )
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped at once; finished blocks are kept, and the same command goes on from there"
        ) from None
    if as_json:
        print_json({"out": str(result.out)} | result.report)
        return
    from sarqc.cli.summary import run_summary

    Console().print(run_summary(result.out, result.report))


def look_ahead(model: str, output: Path, settings: dict[str, Any], as_json: bool) -> None:
    """Print the preflight; an error where the run could not begin."""
    from sarqc.cli.preflight import show
    from sarqc.job.preflight import preflight

    found = preflight(model, output, **settings)
    if as_json:
        print_json(found.to_json())
    else:
        show(Console(), found)
    found.refuse()


# \b keeps the lines of a paragraph apart in the help.
quantize.__doc__ = "\n".join(
    [
        inspect.cleandoc(quantize.__doc__ or ""),
        "\n\b\nMethods:",
        *(f"  {name:<12}{line}" for name, line in ABOUT.items()),
    ]
)

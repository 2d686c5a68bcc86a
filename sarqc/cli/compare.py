"""`sarqc compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sarqc.cli.options import (
    ConfigOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    TrustOption,
    auto_or,
    print_json,
    stderr,
    stdout,
)
from sarqc.cli.run_options import CalibOption, IgnoreOption


def compare(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for table, plot and finished cells.")],
    methods: Annotated[
        str, typer.Option(help="Names with commas between; NAME@0.3 is a method at that fixed strength.")
    ] = "rtn,gptq,sarqc-gptq",
    bits: Annotated[str, typer.Option(help="Numbers with commas between.")] = "4,3",
    group_size: Annotated[str, typer.Option(help="Numbers with commas between, -1 for a whole row, or auto.")] = "auto",
    sym: Annotated[bool, typer.Option("--sym/--asym", help="One fixed zero, or a zero for each group.")] = True,
    calib: CalibOption = "builtin",
    num_samples: Annotated[str, typer.Option(help="Windows of calibration text: numbers with commas between.")] = "16",
    seqlen: Annotated[int, typer.Option(help="Tokens per calibration window.")] = 512,
    seeds: Annotated[str, typer.Option(help="Draws of the windows: numbers with commas between.")] = "0",
    text: Annotated[list[str] | None, typer.Option("--eval", help="Text to judge on, as --calib. Repeatable.")] = None,
    eval_seqlen: Annotated[int, typer.Option(help="Tokens per window of these.")] = 512,
    eval_windows: Annotated[int, typer.Option(help="Only the last so many windows of each.")] = 16,
    ignore: IgnoreOption = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<text>", help="A checkpoint of another tool, METHOD:BITS:GROUP:WINDOWS:SEED=FOLDER. Repeatable."
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Methods x bits x calibration sizes on one model: a table and a plot, for the price of one calibration per seed.

    Statistics are collected once from the unquantized model and serve every method (one-shot: blocks do not see the
    quantized ones before them, as they do in `sarqc quantize`). Run it again to go on after an interruption, or to add
    to what is there: finished cells are not measured twice.

    Example: sarqc compare smollm2 -o table --methods rtn,gptq,sarqc-gptq --bits 4,3 --seeds 0,1,2
    """
    from sarqc.cli.terminal import RunWatcher
    from sarqc.comparison.experiment import Other
    from sarqc.entrypoints.compare import compare as run

    with RunWatcher(stderr()) as watcher:
        found = run(
            model,
            output,
            methods=[name for name in methods.split(",") if name],
            bits=_numbers("bits", bits),
            group_sizes=[auto_or(int, "group_size", size) for size in group_size.split(",") if size],
            sym=sym,
            calib=calib,
            num_samples=_numbers("num_samples", num_samples),
            seqlen=seqlen,
            seeds=_numbers("seeds", seeds),
            texts=text or ["builtin"],
            eval_seqlen=eval_seqlen,
            eval_windows=eval_windows,
            ignore=tuple(ignore or ()),
            also=[Other.parsed(said) for said in also or ()],
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            watcher=watcher,
        )
    if as_json:
        print_json({"out": str(found.out)} | found.table)
        return
    from sarqc.cli.comparison import comparison_tables

    console = stdout()
    for table in comparison_tables(found.table):
        console.print(table)
    console.print(f"{found.out}/compare.json, .csv, .svg", markup=False, highlight=False, soft_wrap=True)


def _numbers(name: str, value: str) -> list[Any]:
    from sarqc.errors import ArgumentError

    try:
        return [int(part) for part in value.split(",") if part]
    except ValueError:
        raise ArgumentError(f"{name} = {value!r} is not usable: use whole numbers with commas between") from None

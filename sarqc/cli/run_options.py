"""Options of `sarqc quantize` alone: how it keeps what it has done, and what it may use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AvgBitsOption = Annotated[
    float | None,
    typer.Option(help="Instead of --bits: so many per weight on average, with scales; layers that lose more get more."),
]
BitsChoicesOption = Annotated[
    str | None, typer.Option(help="Widths that --avg-bits chooses from. Default: 2,3,4,5,6,8. For Marlin: 4,8.")
]
BorrowOption = Annotated[
    float | None,
    typer.Option(
        help="Rows per input that an expert has from its layer's average: more steadies experts that saw few tokens. "
        "Default: 0.25, plain methods 0."
    ),
]
CarryErrorOption = Annotated[
    bool | None,
    typer.Option(
        "--carry-error/--no-carry-error",
        help="Let one layer of each block make up for all errors before it, as far as held-out text allows. "
        "Twice the forward passes. Default: on for sarqc-gptq and sarqc, off for all others.",
    ),
]
CalibOption = Annotated[
    str, typer.Option(help="Calibration text: a UTF-8 file, a data set NAME[:CONFIG[:SPLIT]], or builtin.")
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Show what would be done, what it takes and who would serve it; do nothing."),
]
GateWeightOption = Annotated[
    int | None,
    typer.Option(
        help="0, 1 or 2: power of the router's weight that a token counts with for its experts. 2 is least squares of "
        "the layer's output. Default: 0."
    ),
]
GramBudgetOption = Annotated[
    float | None,
    typer.Option(help="GB of Gram matrices at once; experts beyond it take further passes. Default: 17.2."),
]
GroupSizeOption = Annotated[
    str, typer.Option(help="Inputs per scale: a number, -1 for a whole row, or auto: largest of 128, 64, 32 that fits.")
]
IgnoreOption = Annotated[
    list[str] | None,
    typer.Option(metavar="<regex>", help="Linears that this finds in their names stay as they are. Repeatable."),
]
KeepWorkOption = Annotated[
    bool, typer.Option("--keep-work", help="Keep the work folder, for `sarqc export` to another format.")
]
MicroBatchOption = Annotated[
    int | None, typer.Option(help="Windows at once. Default: as many as hold 1024 tokens on a CPU, 8192 on a GPU.")
]
OrderedOption = Annotated[
    bool, typer.Option("--ordered", help="Several ranks: sum in the order of one process, to have its bytes.")
]
RestartOption = Annotated[bool, typer.Option("--restart", help="Begin again instead of going on from the work folder.")]
SaliencyOption = Annotated[
    str | None,
    typer.Option(help="What the regulariser is weighted with: iso, abs, rms, energy or power:A. Default: as strength."),
]
SamplesOption = Annotated[
    int | None, typer.Option(help="Windows of text to calibrate on. Default: up to 128, as many as the text has.")
]
StateBudgetOption = Annotated[
    float | None,
    typer.Option(
        help="GB of hidden states in memory; more of them wait in a file beside the finished blocks, for the same "
        "result. Default: a quarter of this machine's memory."
    ),
]
StrengthOption = Annotated[
    str | None, typer.Option(help="Weight lambda of the regulariser: auto or a number. Default: the method's own.")
]
SweepsOption = Annotated[
    int | None,
    typer.Option(
        help="Times that codes and scales are improved in turn after the Gram solver's pass; each takes about half as "
        "long as that. Default: 2 for sarqc-gptq, sarqc and rqc-gptq, 0 for all others."
    ),
]
TensorParallelOption = Annotated[
    int | None, typer.Option(help="Ranks that will serve the model: refuse what no server could split so.")
]
WorkOption = Annotated[
    Path | None, typer.Option(help="Folder for finished blocks. Default: a hidden one beside the output.")
]


def widths_of(said: str | None) -> tuple[int, ...]:
    """`2,3,4` as numbers; `ArgumentError` for what is none."""
    from sarqc.errors import ArgumentError

    try:
        return tuple(int(part) for part in said.split(",")) if said else ()
    except ValueError:
        raise ArgumentError(f"bits_choices = {said!r} is not usable: write widths like 2,3,4,8") from None

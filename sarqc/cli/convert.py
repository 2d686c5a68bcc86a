"""`sarqc convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sarqc.cli.options import (
    FormatOption,
    JsonOption,
    OverwriteOption,
    QuantizedArgument,
    TrustOption,
    loading,
    print_json,
    print_line,
    stderr,
    stdout,
)


def convert(
    checkpoint: QuantizedArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist yet.")],
    format: FormatOption,
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a quantized checkpoint in another format, with the same codes, scales and zeros.

    Reads compressed-tensors (both 3-bit layouts), GPTQ v1 and v2 without act-order groups, and AWQ gemm.

    Reads MLX where each bias is an integer multiple of its scale.

    Example: sarqc convert some-model-AWQ -o some-model-ct --format compressed-tensors
    """
    from sarqc.cli.terminal import Ticker

    with loading():
        from sarqc.entrypoints.convert import convert as run

    with Ticker(stderr()) as ticker:
        done = run(
            checkpoint,
            output,
            format=format,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=ticker.follow("tensors"),
        )
    record = {"out": str(done.out)} | done.record
    if as_json:
        print_json(record)
    else:
        print_line(
            stdout(),
            f"{done.out}: {record['from']} -> {record['format']}, {record['quantized_linears']} Linears, "
            f"{record['bits_per_weight']:.3f} bits per weight, every code, scale and zero compared",
        )

"""`sarqc inspect`."""

from __future__ import annotations

from sarqc.cli.options import JsonOption, QuantizedArgument, print_json, stdout


def inspect(
    checkpoint: QuantizedArgument,
    as_json: JsonOption = False,
) -> None:
    """Show format, bits and size of a quantized checkpoint, and the summary of its run."""
    from sarqc.entrypoints.inspect import inspect as run

    contents = run(checkpoint)
    if as_json:
        print_json(contents)
        return
    from sarqc.cli.summary import checkpoint_summary

    stdout().print(checkpoint_summary(contents))

"""`sarqc verify`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sarqc.cli.options import (
    JsonOption,
    QuantizedArgument,
    TrustOption,
    loading,
    print_json,
    print_line,
    stderr,
    stdout,
)


def verify(
    checkpoint: QuantizedArgument,
    against: Annotated[
        str | None, typer.Option(help="The model it was made of: every tensor is compared with its own.")
    ] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check a checkpoint: checksums of tensors and side files, completeness, errors against the original, runtimes.

    Exit code 0 if it is sound; 1 if not, with a line for each problem.
    """
    from sarqc.cli.terminal import Ticker

    with loading():
        from sarqc.entrypoints.verify import verify as run
    from sarqc.serving.compatibility import by_runtime

    with Ticker(stderr()) as ticker:
        result = run(
            checkpoint, against=against, trust_remote_code=trust_remote_code, progress=ticker.follow("tensors")
        )
    if as_json:
        print_json(result.record())
    else:
        servers = (f"  {server}" for server in by_runtime(result.serve))
        for line in (*result.problems, _verdict(result.record(), against), *servers):
            print_line(stdout(), line)
    if not result.sound:
        raise typer.Exit(1)


def _verdict(record: dict[str, Any], against: str | None) -> str:
    """The line that says it all."""
    from sarqc.report.summary import counted

    if not record["sound"]:
        return f"{record['folder']}: not sound"
    message = "readable (no manifest to compare the bits with)"
    if record["manifest"]:
        message = "as written, bit for bit" if record["files"] else "tensors as written, bit for bit"
        message += "" if record["files"] else " (its manifest, of an earlier version, has no side files)"
    error, files = record["weight_error"], counted(record["shards"], "file")
    beside = f"; relative weight error {error:.4f} against {against}" if isinstance(error, float) else ""
    return f"{record['folder']}: sound; {record['tensors']} tensors in {files}, {message}{beside}"

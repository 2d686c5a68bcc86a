"""`sarqc eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from sarqc.cli.options import DeviceOption, DtypeOption, JsonOption, ModelArgument, TrustOption, print_json, stderr


def evaluate(
    model: ModelArgument,
    text: Annotated[str, typer.Option(help="A UTF-8 file, a data set NAME[:CONFIG[:SPLIT]], or builtin.")] = "builtin",
    seqlen: Annotated[int, typer.Option(help="Tokens per window; windows do not overlap.")] = 512,
    max_windows: Annotated[int | None, typer.Option(help="Only the last so many windows of the text.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a model, quantized or not, with the protocol it was measured by."""
    from dataclasses import asdict

    from sarqc.cli.terminal import Ticker
    from sarqc.job.measure import evaluate as run

    with Ticker(stderr()) as ticker:

        def on_window(done: int, total: int, so_far: float) -> None:
            if done == 1:
                ticker.begin("windows", total)
            ticker.advance(f"perplexity {so_far:.3f}")

        found = run(
            model,
            text=text,
            seqlen=seqlen,
            max_windows=max_windows,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            on_window=on_window,
        )
    if as_json:
        print_json({"model": model} | asdict(found))
        return
    windows, length = found.protocol["windows"], found.protocol["seqlen"]
    print(f"perplexity {found.perplexity:.3f}  ({windows} windows of {length} tokens of {text}, {found.seconds:.0f} s)")

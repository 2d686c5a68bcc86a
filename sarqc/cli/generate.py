"""`sarqc generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from sarqc.cli.options import (
    DeviceOption,
    DtypeOption,
    ExpandedOption,
    JsonOption,
    ModelArgument,
    TrustOption,
    loading,
    print_json,
)


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 48,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    expanded: ExpandedOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a text by greedy decoding."""
    with loading():
        from sarqc.entrypoints.generate import generate as run

    text = run(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        packed=not expanded,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json({"model": model, "prompt": prompt, "text": text})
    else:
        print(text)

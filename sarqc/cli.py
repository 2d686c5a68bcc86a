"""The door: commands, their help, progress, and errors as one line with exit code 2.

Nothing heavy is imported until a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

app = typer.Typer(
    name="sarqc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize language models to 2..8 bits with regularised calibration, and see what it cost.",
)

ModelArgument = Annotated[
    str, typer.Argument(help="Local folder, hub id (OWNER/NAME), or 'smollm2', the packaged one.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="Of activations: auto (float32 on a CPU, the checkpoint's on a GPU), float32, bfloat16, float16."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
TrustOption = Annotated[
    bool, typer.Option(help="Run Python code that comes with the model. Off: such models are refused.")
]


def _values_from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take defaults of the other options from a YAML file; what stands on the command line wins."""
    if path is None:
        return None
    import yaml

    from sarqc.errors import ArgumentError

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArgumentError(f"--config {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ArgumentError(f"--config {path} must hold option: value lines, it holds a {type(values).__name__}")
    known = {p.name: p for p in context.command.params if p.name not in {"config", "help"}}
    for key in values:
        if str(key).replace("-", "_") not in known:
            raise ArgumentError(f"--config {path}: no option {key!r}; known are {', '.join(sorted(map(str, known)))}")
    context.default_map = {str(key).replace("-", "_"): value for key, value in values.items()}
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        is_eager=True, callback=_values_from_file, help="YAML file with any of these options; the command line wins."
    ),
]


@app.command()
def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist yet.")],
    method: Annotated[
        str,
        typer.Option(
            help="sarqc-gptq (saliency-regularised), rqc-gptq (isotropic), gptq (as common tools), rtn (rounding)."
        ),
    ] = "sarqc-gptq",
    bits: Annotated[int, typer.Option(help="2 to 8.")] = 4,
    group_size: Annotated[
        str,
        typer.Option(help="Inputs per scale: a number, -1 for a whole row, or auto: largest of 128, 64, 32 that fits."),
    ] = "auto",
    sym: Annotated[bool, typer.Option("--sym/--asym", help="One fixed zero, or a zero for each group.")] = True,
    strength: Annotated[
        str | None, typer.Option(help="Weight lambda of the regulariser: auto or a number. Default: the method's own.")
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
    ignore: Annotated[
        list[str] | None, typer.Option(help="Regular expression; Linears it finds stay as they are. Repeatable.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder, once the new one is whole.")] = False,
    trust_remote_code: TrustOption = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model to a checkpoint in compressed-tensors form, which vLLM, SGLang and transformers read.

    Example: sarqc quantize Qwen/Qwen3-8B -o qwen3-8b-w4 --bits 4
    """
    from sarqc.job.run import quantize as run
    from sarqc.terminal import RunWatcher

    with RunWatcher(_stderr()) as watcher:
        result = run(
            model,
            output,
            method=method,
            bits=bits,
            group_size=_auto_or(int, "group_size", group_size),
            sym=sym,
            strength=None if strength is None else _auto_or(float, "strength", strength),
            calib=calib,
            num_samples=num_samples,
            seqlen=seqlen,
            seed=seed,
            device=device,
            dtype=dtype,
            ignore=tuple(ignore or ()),
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            watcher=watcher,
        )
    if as_json:
        _print_json({"out": str(result.out)} | result.report)
        return
    from sarqc.summary import run_summary

    Console().print(run_summary(result.out, result.report))


@app.command(name="eval")
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

    from sarqc.job.measure import evaluate as run
    from sarqc.terminal import Ticker

    with Ticker(_stderr()) as ticker:

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
        _print_json({"model": model} | asdict(found))
        return
    windows, length = found.protocol["windows"], found.protocol["seqlen"]
    print(f"perplexity {found.perplexity:.3f}  ({windows} windows of {length} tokens of {text}, {found.seconds:.0f} s)")


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How far.")] = 48,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a text, greedily."""
    from sarqc.job.generate import generate as run

    text = run(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        _print_json({"model": model, "prompt": prompt, "text": text})
    else:
        print(text)


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that `sarqc quantize` wrote.")],
    as_json: JsonOption = False,
) -> None:
    """What is in a quantized checkpoint: format, bits, size, and how the run went."""
    from sarqc.job.inspect import inspect as run

    found = run(checkpoint)
    if as_json:
        _print_json(found)
        return
    from sarqc.summary import checkpoint_summary

    Console().print(checkpoint_summary(found))


def main() -> NoReturn:
    """Run the command line; errors of the user become one line on stderr and exit code 2."""
    from sarqc.errors import SarqcError

    try:
        app(standalone_mode=True)
    except SarqcError as error:
        print(f"sarqc: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("sarqc: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _auto_or(kind: type[int] | type[float], name: str, value: str) -> Any:
    from sarqc.errors import ArgumentError
    from sarqc.spec import AUTO

    if value == AUTO:
        return AUTO
    try:
        return kind(value)
    except ValueError:
        raise ArgumentError(f"{name} = {value!r} is not usable: use auto or a number") from None


def _stderr() -> Console:
    return Console(stderr=True)


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values, indent=2, allow_nan=False))

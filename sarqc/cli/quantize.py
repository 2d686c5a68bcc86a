"""`sarqc quantize`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    gigabytes,
    print_json,
    stderr,
    stdout,
)
from sarqc.cli.run_options import (
    AvgBitsOption,
    BitsChoicesOption,
    BorrowOption,
    CalibOption,
    CarryErrorOption,
    DryRunOption,
    GateWeightOption,
    GramBudgetOption,
    GroupSizeOption,
    IgnoreOption,
    KeepWorkOption,
    MicroBatchOption,
    OrderedOption,
    RestartOption,
    SaliencyOption,
    SamplesOption,
    StateBudgetOption,
    StrengthOption,
    SweepsOption,
    TensorParallelOption,
    WorkOption,
    widths_of,
)
from sarqc.config import ABOUT, DEFAULT_METHOD

if TYPE_CHECKING:
    from sarqc.pipeline.write import Result


def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist yet.")],
    method: Annotated[str, typer.Option(help="One of the methods above.")] = DEFAULT_METHOD,
    bits: Annotated[int, typer.Option(help="2 to 8.")] = 4,
    avg_bits: AvgBitsOption = None,
    bits_choices: BitsChoicesOption = None,
    group_size: GroupSizeOption = "auto",
    sym: Annotated[bool, typer.Option("--sym/--asym", help="One fixed zero, or a zero for each group.")] = True,
    strength: StrengthOption = None,
    saliency: SaliencyOption = None,
    borrow: BorrowOption = None,
    gate_weight: GateWeightOption = None,
    sweeps: SweepsOption = None,
    carry_error: CarryErrorOption = None,
    calib: CalibOption = "builtin",
    num_samples: SamplesOption = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per window. Default: 2048, or all positions of a shorter model.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of windows.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    micro_batch: MicroBatchOption = None,
    gram_budget: GramBudgetOption = None,
    state_budget: StateBudgetOption = None,
    ignore: IgnoreOption = None,
    format: FormatOption = "compressed-tensors",
    tp: TensorParallelOption = None,
    work: WorkOption = None,
    keep_work: KeepWorkOption = False,
    restart: RestartOption = False,
    dry_run: DryRunOption = False,
    ordered: OrderedOption = False,
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model to a checkpoint that vLLM, SGLang and transformers read.

    Example: sarqc quantize Qwen/Qwen3-8B -o qwen3-8b-w4 --bits 4

    A run that was killed or stopped (Ctrl-C) goes on where it was when the same command is given again.

    Several GPUs share a run: torchrun --nproc-per-node N -m sarqc quantize ...
    """
    from sarqc.pipeline.distributed import leads

    settings: dict[str, Any] = dict(
        method=method, bits=bits, avg_bits=avg_bits, bits_choices=widths_of(bits_choices),
        group_size=auto_or(int, "group_size", group_size), sym=sym,
        strength=None if strength is None else auto_or(float, "strength", strength), saliency=saliency,
        borrow=borrow, gate_weight=gate_weight, sweeps=sweeps, carry_error=carry_error, calib=calib,
        num_samples=num_samples, seqlen=seqlen, seed=seed, device=device, dtype=dtype, micro_batch=micro_batch,
        **({} if gram_budget is None else {"gram_budget": gigabytes("gram_budget", gram_budget)}),
        state_budget=None if state_budget is None else gigabytes("state_budget", state_budget),
        ignore=tuple(ignore or ()), format=format, tp=tp, trust_remote_code=trust_remote_code, work=work,
    )  # fmt: skip
    if dry_run:
        if leads():
            look_ahead(model, output, settings, overwrite, as_json)
        return
    manner = dict(keep_work=keep_work, restart=restart, overwrite=overwrite, ordered=ordered)
    result = carry_out(model, output, settings, manner)
    if not leads():
        return
    if as_json:
        print_json({"out": str(result.out)} | result.report)
        return
    from sarqc.cli.summary import run_summary

    stdout().print(run_summary(result.out, result.report))


def carry_out(model: str, output: Path, settings: dict[str, Any], manner: dict[str, Any]) -> Result:
    """Run it with a bar; Ctrl-C twice becomes the error that says how to go on."""
    from sarqc.cli.terminal import RunWatcher
    from sarqc.entrypoints.quantize import quantize as run
    from sarqc.errors import Interrupted

    try:
        with RunWatcher(stderr()) as watcher:
            return run(model, output, **settings, **manner, watcher=watcher)
    except KeyboardInterrupt:
        how = "stopped at once; finished blocks are kept, and the same command goes on from there"
        raise Interrupted(how) from None


def look_ahead(model: str, output: Path, settings: dict[str, Any], overwrite: bool, as_json: bool) -> None:
    """Print the preflight; an error where the run could not begin."""
    from sarqc.checkpoint.folders import refuse_existing
    from sarqc.cli.preflight import show
    from sarqc.entrypoints.estimate import preflight

    refuse_existing(output.expanduser(), overwrite)
    found = preflight(model, output, **settings)
    if as_json:
        print_json(found.to_json())
    else:
        show(stdout(), found)
    found.refuse()


# \b keeps the lines of a paragraph apart in the help.
quantize.__doc__ = "\n".join(
    [
        inspect.cleandoc(quantize.__doc__ or ""),
        "\n\b\nMethods:",
        *(f"  {name:<12}{line}" for name, line in ABOUT.items()),
    ]
)

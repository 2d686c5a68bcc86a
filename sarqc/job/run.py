"""Quantize: a model goes in, a low-bit checkpoint comes out, whole or not at all.

Everything that can be refused is refused before the first block: names, text, shapes, the output folder. Then blocks
are solved one by one and written as they come, into a hidden folder beside the output that takes its name at the end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sarqc.checkpoint.folders import atomic_folder, refuse_existing, refuse_overlap
from sarqc.checkpoint.formats import FORMATS, Format
from sarqc.checkpoint.reader import Checkpoint, open_checkpoint
from sarqc.checkpoint.side_files import copy_side_files, write_config
from sarqc.checkpoint.writer import ShardWriter
from sarqc.errors import ArgumentError, CheckpointError
from sarqc.job import report as reports
from sarqc.job.load import resolve_device, resolve_dtype
from sarqc.job.locate import locate
from sarqc.job.verify import verify
from sarqc.method.solve import SolveReport
from sarqc.model import blocks, calibration
from sarqc.model.skeleton import Skeleton
from sarqc.model.targets import Targets, auto_group_size, check_group_size, targets
from sarqc.model.tokenizer import load_tokenizer
from sarqc.spec import AUTO, DEFAULT_METHOD, QuantSpec, SolveSpec, solve_spec

DEFAULT_SAMPLES = 128
DEFAULT_SEQLEN = 2048


class Watcher(Protocol):
    """Whoever wants to follow a run. All methods are called from the thread that runs it."""

    def note(self, text: str) -> None:
        """Something worth one line: what was chosen, what is being read."""

    def begin_blocks(self, blocks: int) -> None:
        """The blocks start; there are so many."""

    def stage(self, block: int, name: str) -> None:
        """Block number `block` (from 0) begins a stage: load, observe, solve, replay."""

    def block(self, result: blocks.BlockResult) -> None:
        """A block is solved and written."""


class Silent:
    """The watcher that looks away."""

    def note(self, text: str) -> None:
        """Nothing."""

    def begin_blocks(self, blocks: int) -> None:
        """Nothing."""

    def stage(self, block: int, name: str) -> None:
        """Nothing."""

    def block(self, result: blocks.BlockResult) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Result:
    """out: the checkpoint's folder. report: what report.json in it holds."""

    out: Path
    report: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A run with every choice made and every refusal behind it."""

    model: str
    folder: Path
    out: Path
    checkpoint: Checkpoint
    skeleton: Skeleton
    targets: Targets
    quant: QuantSpec
    solve: SolveSpec
    format: Format
    windows: calibration.Windows | None
    device: torch.device
    dtype: torch.dtype


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    method: str = DEFAULT_METHOD,
    bits: int = 4,
    group_size: int | Literal["auto"] = AUTO,
    sym: bool = True,
    strength: float | Literal["auto"] | None = None,
    saliency: str | None = None,
    calib: str | Path | Tensor = calibration.BUILTIN,
    num_samples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    ignore: Sequence[str] = (),
    format: str = "compressed-tensors",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    watcher: Watcher | None = None,
) -> Result:
    """Quantize a causal language model to a checkpoint in the folder `out`.

    model: local folder, hub id, or `smollm2`. method: a key of `sarqc.METHODS`. bits: 2 to 8. group_size: inputs per
    scale, -1 for one scale a row, "auto" for the largest of 128, 64, 32 that divides every layer's inputs.
    strength, saliency: of the regulariser; None is the method's own. calib: text to calibrate on (a UTF-8 file, a data
    set, `builtin`) or tokens int64 [S, L]. num_samples: exactly so many windows of `seqlen` tokens, drawn with `seed`;
    by default up to 128, of 2048. dtype: of the forward passes. ignore: regular expressions of Linears to leave.

    Raises `SarqcError` for anything wrong with the input, before `out` exists.
    """
    watcher = watcher or Silent()
    if format not in FORMATS:
        raise ArgumentError(f"format = {format!r} is not known: use {', '.join(FORMATS)}")
    quant = QuantSpec(bits=bits, group_size=128 if group_size == AUTO else group_size, sym=sym, ignore=tuple(ignore))
    solve = solve_spec(method, strength=strength, saliency=saliency, seed=seed)
    refuse_existing(out, overwrite)
    folder = locate(model, trust_remote_code=trust_remote_code)
    refuse_overlap(out, folder)
    checkpoint = open_checkpoint(folder)
    if checkpoint.format is not None:
        raise CheckpointError(f"{folder} is quantized already ({checkpoint.format.name}): give the original model")
    skeleton = Skeleton.from_folder(folder, checkpoint, trust_remote_code=trust_remote_code)
    found = targets(skeleton, quant)
    if group_size == AUTO:
        quant = replace(quant, group_size=auto_group_size(found))
        watcher.note(f"group size {quant.group_size}: the largest of 128, 64, 32 that divides every layer's inputs")
    check_group_size(found, quant)
    chosen = FORMATS[format]
    chosen.check(quant)
    for target in found.selected:
        chosen.check_layer(target.linear, target.shape, quant)
    where = resolve_device(device)
    plan = Plan(
        model=str(model),
        folder=folder,
        out=Path(out),
        checkpoint=checkpoint,
        skeleton=skeleton,
        targets=found,
        quant=quant,
        solve=solve,
        format=chosen,
        windows=_windows(calib, folder, num_samples, seqlen, seed, trust_remote_code) if solve.gram else None,
        device=where,
        dtype=resolve_dtype(dtype, where, skeleton.dtype),
    )
    return _carry_out(plan, overwrite, trust_remote_code, watcher)


def _windows(
    calib: str | Path | Tensor, folder: Path, count: int | None, seqlen: int | None, seed: int, trust: bool
) -> calibration.Windows:
    if isinstance(calib, Tensor):
        found = calibration.Windows.of_tokens(calib)
    else:
        tokenizer = load_tokenizer(folder, trust_remote_code=trust)
        found = calibration.windows(str(calib), tokenizer, part="calibration", seqlen=seqlen or DEFAULT_SEQLEN)
    return found.draw(min(DEFAULT_SAMPLES, found.available) if count is None else count, seed)


def _carry_out(plan: Plan, overwrite: bool, trust_remote_code: bool, watcher: Watcher) -> Result:
    began = time.perf_counter()
    solved: list[SolveReport] = []
    stages: dict[str, float] = {}
    spent: list[tuple[int, dict[str, float]]] = []
    size = reports.Size()
    with atomic_folder(plan.out, overwrite=overwrite) as partial:
        writer = ShardWriter(partial)
        changed: set[str] = set()
        watcher.begin_blocks(len(plan.skeleton.blocks))
        for result in _solve_blocks(plan, watcher):
            for linear, weight in result.weights.items():
                packed = plan.format.pack(linear, weight, plan.quant)
                size.quantized(weight, packed)
                for name, tensor in packed.items():
                    writer.add(name, tensor)
            for name, tensor in result.changed.items():
                size.left(tensor)
                writer.add(name, tensor)
            changed |= result.changed.keys()
            solved += result.reports
            spent.append((result.index, result.seconds))
            for stage, seconds in result.seconds.items():
                stages[stage] = stages.get(stage, 0.0) + seconds
            watcher.block(result)
        watcher.note("writing and checking the checkpoint")
        for name, tensor in _left_alone(plan, changed):
            size.left(tensor)
            writer.add(name, tensor)
        writer.close()
        copy_side_files(plan.folder, partial, code=trust_remote_code)
        write_config(partial, plan.checkpoint.config, plan.format.config(plan.quant, plan.targets.untouched))
        checked = verify(partial, against=plan.folder, trust_remote_code=trust_remote_code)
        checked.require()
        stages["total"] = time.perf_counter() - began
        report = reports.build(
            model=plan.model,
            quant=plan.quant,
            solve=plan.solve,
            calibration=plan.windows.record() if plan.windows else None,
            targets=plan.targets.record(),
            sites=solved,
            blocks=spent,
            stages=stages,
            source=reports.source_record(plan.folder, plan.checkpoint),
            size=size.record(),
            device=str(plan.device),
        )
        report["weight_errors"] = checked.errors
        reports.write(partial, report)
    return Result(plan.out, report)


def _left_alone(plan: Plan, changed: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the source that stays as it is, byte for byte; `changed` names those that took up scales."""
    replaced = {f"{linear}.weight" for linear in plan.targets.linears} | changed
    for name in plan.checkpoint.names():
        if name not in replaced:
            yield name, plan.checkpoint.load(name)


def _solve_blocks(plan: Plan, watcher: Watcher) -> Iterator[blocks.BlockResult]:
    return blocks.run(
        plan.skeleton,
        plan.checkpoint,
        plan.windows.tokens if plan.windows else None,
        plan.quant,
        plan.solve,
        device=plan.device,
        dtype=plan.dtype,
        on_progress=watcher.stage,
    )

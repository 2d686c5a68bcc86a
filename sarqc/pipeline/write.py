"""From finished blocks to a checkpoint: pack, write, put the side files beside, read everything back."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sarqc.checkpoint.folders import atomic_folder
from sarqc.checkpoint.formats import Format
from sarqc.checkpoint.reader import Checkpoint
from sarqc.checkpoint.side_files import copy_side_files, write_config
from sarqc.checkpoint.writer import ShardWriter
from sarqc.config import AUTO, MethodConfig, QuantConfig
from sarqc.options import from_record
from sarqc.pipeline.resume import BlockRecord, Work
from sarqc.pipeline.verify import check
from sarqc.report import report as reports
from sarqc.serving.compatibility import ranks_by_server


@dataclass(frozen=True)
class Result:
    """out: the checkpoint's folder. report: what report.json in it holds."""

    out: Path
    report: dict[str, Any]


def write_checkpoint(
    work: Work, checkpoint: Checkpoint, out: Path, format: Format, *, overwrite: bool = False
) -> Result:
    """Write the finished blocks of `work`, with whatever of `checkpoint` they leave alone, to the folder `out`."""
    work.check_finished()
    quant = from_record(QuantConfig, work.fingerprint["quant"])
    format.check(quant)
    began = time.perf_counter()
    size = reports.Size()
    token = hashlib.sha256(str(work.folder.resolve()).encode()).hexdigest()[:8]
    with atomic_folder(out, overwrite=overwrite, token=token) as partial:
        writer = ShardWriter(partial)
        for name, tensor in _tensors(work, checkpoint, format, quant, size):
            writer.add(name, tensor)
        writer.close()
        copy_side_files(checkpoint.folder, partial, code=work.about["code"])
        bit_widths = chosen.by_linear() if (chosen := work.bit_widths()) else None
        write_config(partial, checkpoint.config, format.config(quant, work.about["targets"]["untouched"], bit_widths))
        report = _report(work, checkpoint, quant, size, time.perf_counter() - began) | {"format": format.name}
        reports.write(partial, report)  # names the tensors that took up scales, which the comparison has to know
        checked = check(partial, checkpoint, trust_remote_code=work.about["code"])
        checked.require()
        report["weight_errors"] = checked.errors
        report["serve"] = ranks_by_server(checked.serve)
        reports.write(partial, report)
    return Result(out, report)


def _tensors(
    work: Work, checkpoint: Checkpoint, format: Format, quant: QuantConfig, size: reports.Size
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint: first what stays as it is, byte for byte, then the blocks."""
    blocks = range(work.blocks)
    replaced = {f"{linear}.weight" for index in blocks for linear in work.linears(index)}
    replaced |= {name for index in blocks for name in work.changed_names(index)}
    for name in checkpoint.names():
        if name not in replaced:
            tensor = checkpoint.load(name)
            size.left(tensor)
            yield name, tensor
    for index in blocks:
        for linear, weight in work.each_weight(index):
            packed = format.pack(linear, weight, quant.at(weight.bits))
            size.quantized(weight, packed)
            yield from packed.items()
        for name, tensor in work.changed(index).items():
            size.left(tensor)
            yield name, tensor


def _report(
    work: Work, checkpoint: Checkpoint, quant: QuantConfig, size: reports.Size, seconds: float
) -> dict[str, Any]:
    records = [work.record(index) for index in range(work.blocks)]
    stages: dict[str, float] = {}
    for record in records:
        for stage, spent in record.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + spent
    chosen = work.bit_widths()
    stages |= {"sensitivity": chosen.seconds} if chosen else {}
    stages["write"] = seconds
    stages["total"] = sum(record.wall for record in records) + stages.get("sensitivity", 0.0) + seconds
    report = reports.build(
        model=work.about["model"],
        source=reports.source_record(checkpoint.folder, checkpoint),
        quant=quant,
        method=from_record(MethodConfig, work.fingerprint["method"]),
        calibration=work.about["calibration"],
        targets=work.about["targets"],
        sites=[site for record in records for site in record.reports],
        blocks=[(index, record.seconds) for index, record in enumerate(records)],
        stages=stages,
        size=size.record(),
        device=work.about["device"],
        notes=[note for record in records for note in record.notes],
    )
    if (dtype := work.about.get("dtype", AUTO)) != AUTO:
        report["dtype"] = dtype
    if work.about["code"]:
        report["trust_remote_code"] = True
    if chosen:
        report["widths"] = chosen.record()
    if rescaled := [name for index, record in enumerate(records) for name in _rescaled(work, index, record)]:
        report["rescaled"] = rescaled
    return report


def _rescaled(work: Work, index: int, record: BlockRecord) -> list[str]:
    """Tensors of a block that are not comparable with the source's: those that took up channel scales, and where there
    are any the weights too, which are quantized after their inputs and outputs were scaled."""
    scaled = any(report.exponent > 0 for report in record.reports)
    weights = [f"{linear}.weight" for linear in work.linears(index)] if scaled else []
    return [*work.changed_names(index), *weights]

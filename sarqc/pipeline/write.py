"""From finished blocks to a checkpoint: their shards are renamed, the other tensors and files are put beside them.

Everything is read back once, and compared with its sum and with the model it was made of. Another format than the
neutral one of the blocks is made by the code of `sarqc convert` from the finished checkpoint.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sarqc.checkpoint.assemble import assemble
from sarqc.checkpoint.convert import Conversion
from sarqc.checkpoint.file_sums import record_files
from sarqc.checkpoint.folders import atomic_folder
from sarqc.checkpoint.formats import NEUTRAL, Format
from sarqc.checkpoint.reader import Checkpoint, open_checkpoint
from sarqc.checkpoint.side_files import copy_side_files, write_config
from sarqc.checkpoint.state import ChunkedTensor
from sarqc.config import AUTO, DEFAULT_EFFORT, MethodConfig
from sarqc.errors import CheckpointError, ResourceError
from sarqc.model.lazy_model import LazyModel
from sarqc.model.source import TensorSource
from sarqc.options import from_record, record
from sarqc.pipeline.resume import BlockRecord, WorkFolder
from sarqc.pipeline.verify import Verified, check
from sarqc.report import model_card
from sarqc.report import report as reports
from sarqc.report.result import Result
from sarqc.report.schema import SIZES
from sarqc.serving.compatibility import checkpoint_support, ranks_by_server
from sarqc.system import peak_memory_mib, versions


def tensors_of_block(lazy: LazyModel, source: TensorSource, index: int) -> dict[str, ChunkedTensor]:
    """The checkpoint's tensors that unit `index` is made of, each read when it is needed.

    A tensor of several units belongs to the first of them.
    """
    before: set[str] = set()
    for block in range(index + 1):
        names = _names(lazy, block) - before
        before |= names
    return {name: _lazy(source, name) for name in sorted(names)}


def write_checkpoint(
    work: WorkFolder, checkpoint: Checkpoint, out: Path, format: Format, *, overwrite: bool = False
) -> Result:
    """Make the folder `out` of the finished blocks of `work`, and of whatever of `checkpoint` they leave alone."""
    finish = _Finish(work, checkpoint)
    token = hashlib.sha256(str(work.folder.resolve()).encode()).hexdigest()[:8]
    if format is NEUTRAL:
        with atomic_folder(out, overwrite=overwrite, token=token, within=work.built) as folder:
            report = finish.report(finish.fill(folder))
            reports.write(folder, report)
        return Result.of(out, report)
    try:
        work.built.mkdir()
    except OSError as error:
        raise ResourceError(f"{work.built} cannot be made: {error.strerror or error}") from error
    report = finish.report(finish.fill(work.built))
    code = work.about["code"]
    with open_checkpoint(work.built) as neutral, atomic_folder(out, overwrite=overwrite, token=token) as folder:
        converted = Conversion(neutral, format, work.about["targets"].get("embeddings", ())).write(folder, code=code)
        with open_checkpoint(folder) as written:
            lazy = LazyModel.from_folder(folder, written, trust_remote_code=code)
            report["serve"] = ranks_by_server(checkpoint_support(written, lazy))
        report |= {"format": converted["format"], "size": {name: converted[name] for name in SIZES}}
        reports.write(folder, report)
    return Result.of(out, report)


class _Finish:
    """The end of a run whose blocks are all finished."""

    def __init__(self, work: WorkFolder, checkpoint: Checkpoint) -> None:
        self.work, self.checkpoint = work, checkpoint
        self.records = [work.record(index) for index in range(work.blocks)]
        self.chosen = work.bit_widths()
        self.rescaled = [name for record in self.records for name in _rescaled(record)]
        self._began = time.perf_counter()

    def fill(self, folder: Path) -> Verified:
        """Make the checkpoint in the empty `folder`, all but its report, and read it back; `CheckpointError` where it
        is not what it has to be."""
        work, checkpoint = self.work, self.checkpoint
        stored = {name for record in self.records for name in record.sums}
        stored |= {f"{linear}.weight" for record in self.records for linear in record.linears}
        rest = {name: _lazy(checkpoint, name) for name in checkpoint.names() if name not in stored}
        assemble(folder, [(work.shard(index), record.sums) for index, record in enumerate(self.records)], rest)
        copy_side_files(checkpoint.folder, folder, code=work.about["code"])
        solved = {linear: bits for record in self.records for linear, bits in record.linears.items()}
        bits = self.chosen.by_linear() if self.chosen else solved
        quantization = NEUTRAL.config(work.quant, work.about["targets"]["unquantized"], bits)
        write_config(folder, checkpoint.config, NEUTRAL, quantization)
        record_files(folder)
        checked = check(folder, checkpoint, rescaled=self.rescaled, trust_remote_code=work.about["code"])
        try:
            checked.require()
        except CheckpointError as error:
            raise CheckpointError(f"{error}; the same command makes damaged blocks again, --no-resume all") from error
        return checked

    def report(self, checked: Verified) -> dict[str, Any]:
        """What report.json will hold of the checkpoint that `fill` made."""
        assert checked.stored is not None
        work, records, chosen = self.work, self.records, self.chosen
        about, sites = work.about, [site for block in records for site in block.reports]
        report = {
            "model": about["model"],
            "source": self._source(),
            "quant": record(work.quant),
            "method": record(from_record(MethodConfig, work.fingerprint["method"])),
            "calibration": about["calibration"],
            "targets": about["targets"],
            "size": checked.stored.record(),
            "error": _mean([site.error for site in sites]),
            "rtn_error": _mean([site.rtn_error for site in sites]),
            "notes": [note for block in records for note in block.notes],
            "fallbacks": {site.site: site.fallback for site in sites if site.fallback},
            "seconds": _rounded(self._stages()),
            "blocks": [{"index": index, "seconds": _rounded(block.seconds)} for index, block in enumerate(records)],
            "peak_memory_mib": peak_memory_mib(),
            "device": about["device"],
            "versions": versions(),
            "sites": [asdict(site) | {"rows": list(site.rows)} for site in sites],
        }
        if (dtype := about.get("dtype", AUTO)) != AUTO:
            report["dtype"] = dtype
        if (effort := about.get("effort", DEFAULT_EFFORT)) != DEFAULT_EFFORT:
            report["effort"] = effort
        if about["code"]:
            report["trust_remote_code"] = True
        if chosen:
            report["widths"] = chosen.record()
        if self.rescaled:
            report["rescaled"] = self.rescaled
        return report | {
            "format": NEUTRAL.name,
            "weight_errors": checked.errors,
            "serve": ranks_by_server(checked.serve),
        }

    def _source(self) -> dict[str, Any]:
        """Of the original: bytes of its tensors, and the licence its own card states."""
        source = self.checkpoint
        size = sum(math.prod(source.shape(name)) * source.dtype(name).itemsize for name in source.names())
        return {"bytes": size, **model_card.licence(source.folder)}

    def _stages(self) -> dict[str, float]:
        """Seconds of each stage over all blocks."""
        stages: dict[str, float] = {}
        for block in self.records:
            for stage, spent in block.seconds.items():
                stages[stage] = stages.get(stage, 0.0) + spent
        stages |= {"sensitivity": self.chosen.seconds} if self.chosen else {}
        stages["write"] = time.perf_counter() - self._began
        walls = sum(record.wall for record in self.records)
        stages["total"] = walls + stages.get("sensitivity", 0.0) + stages["write"]
        return stages


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {stage: round(spent, 3) for stage, spent in seconds.items()}


def _rescaled(record: BlockRecord) -> Sequence[str]:
    """Tensors of a block that are not comparable with the source's: those that took up channel scales, and where there
    are any the weights too, which are quantized after their inputs and outputs were scaled."""
    scaled = any(report.exponent > 0 for report in record.reports)
    return [*record.changed, *(f"{linear}.weight" for linear in record.linears if scaled)]


def _names(lazy: LazyModel, index: int) -> set[str]:
    start = f"{lazy.unit_name(index)}."
    return {stored.name for name, slices in lazy.slices.items() if name.startswith(start) for stored in slices}


def _lazy(source: TensorSource, name: str) -> ChunkedTensor:
    return ChunkedTensor(source.shape(name), source.dtype(name), lambda: map(source.load, [name]))

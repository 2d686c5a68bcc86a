"""What a run leaves behind beside the weights: report.json, and what is made of it.

report.json holds every setting and every number of the run. report.html (`page`) and the model card (`card`)
show the same to readers; both are functions of report.json alone, so `write` writes the three together and `rebuild`
makes the page again wherever only report.json survived. Readers take older reports, which lack some keys, and newer
ones, which have more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sarqc import legacy
from sarqc.checkpoint.files import file_in, read_json, write_text
from sarqc.config import MethodConfig, QuantConfig
from sarqc.errors import CheckpointError
from sarqc.method.layer import LayerReport
from sarqc.model.source import TensorSource
from sarqc.options import record
from sarqc.report import model_card, page
from sarqc.report.schema import check
from sarqc.system import peak_memory_mib, versions

REPORT, PAGE = "report.json", "report.html"


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What a report says of a run.

    Attributes:
        model: As it was named.
        source: As `source_record` gives it.
        quant: The number format.
        method: The method.
        calibration: Where the calibration data is from; None without any.
        targets: Which layers are quantized, and why others are not.
        size: Bytes and bits per weight.
        sites: Results of all sites.
        blocks: Seconds of each stage, by block.
        stages: The same of the whole run.
        device: Where it ran.
        notes: What did not go as planned.
    """

    model: str
    source: dict[str, Any]
    quant: QuantConfig
    method: MethodConfig
    calibration: dict[str, Any] | None
    targets: dict[str, Any]
    size: dict[str, Any]
    sites: Sequence[LayerReport]
    blocks: Sequence[Mapping[str, float]]
    stages: Mapping[str, float]
    device: str
    notes: Sequence[str] = ()

    def report(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "model": self.model,
            "source": self.source,
            "quant": record(self.quant),
            "method": record(self.method),
            "calibration": self.calibration,
            "targets": self.targets,
            "size": self.size,
            "error": _mean([site.error for site in self.sites]),
            "rtn_error": _mean([site.rtn_error for site in self.sites]),
            "notes": list(self.notes),
            "fallbacks": {site.site: site.fallback for site in self.sites if site.fallback},
            "seconds": _rounded(self.stages),
            "blocks": [{"index": index, "seconds": _rounded(spent)} for index, spent in enumerate(self.blocks)],
            "peak_memory_mib": peak_memory_mib(),
            "device": self.device,
            "versions": versions(),
            "sites": [asdict(site) | {"rows": list(site.rows)} for site in self.sites],
        }


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {stage: round(spent, 3) for stage, spent in seconds.items()}


def source_record(folder: Path, source: TensorSource) -> dict[str, Any]:
    """Of the original: bytes of its tensors, and the licence its own card states."""
    size = 0
    for name in source.names():
        size += math.prod(source.shape(name)) * source.dtype(name).itemsize
    return {"bytes": size, **model_card.licence(folder)}


def write(folder: Path, report: dict[str, Any], *, card: bool = True) -> None:
    """Write report.json, report.html and, with `card`, the model card README.md into `folder`."""
    write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
    write_text(folder / PAGE, page.page(report))
    if card:
        write_text(folder / model_card.CARD, model_card.card(report))


def rebuild(folder: Path) -> Path:
    """Make report.html in `folder` again from its report.json, and say where it is.

    Raises `CheckpointError` where there is no report.json that can be read.
    """
    write_text(folder / PAGE, page.page(load(folder)))
    return folder / PAGE


def update(folder: Path, report: dict[str, Any]) -> bool:
    """Write a report that grew in the place of the one in `folder`, and what is made of it.

    A model card that somebody edited is left as it is; returns whether the card is current.
    """
    ours = not model_card.edited(folder)
    write(folder, report, card=ours)
    return ours


def read(folder: Path) -> dict[str, Any] | None:
    """The report in `folder`, or None where there is none that is whole."""
    try:
        path = file_in(folder, REPORT)
        return None if path is None else legacy.report(read_json(path))
    except CheckpointError:
        return None


def load(folder: Path) -> dict[str, Any]:
    """The report in `folder`, with everything in it that is shown; `CheckpointError` saying what is missing."""
    content = read(folder)
    if content is None:
        raise CheckpointError(
            f"{folder / REPORT} is not there or is not JSON: give a folder that `sarqc quantize` wrote"
        )
    check(content, str(folder / REPORT))
    return content


def whole(folder: Path) -> dict[str, Any] | None:
    """As `load`, but None where there is no report that can be shown."""
    try:
        return load(folder)
    except CheckpointError:
        return None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

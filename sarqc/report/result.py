"""What a run returns: where the checkpoint is, and the numbers of its report that people read, typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LayerResult:
    """One group of Linears that read the same tensor, or all experts of a layer.

    Attributes:
        name: Name of the group.
        bits: Bits per weight.
        error: Squared error of the output on the calibration data, relative to the output.
        rtn_error: The same error of round-to-nearest.
        reg_lambda: Largest lambda that was used.
        rows: Calibration rows of each expert; one number for a dense layer, none without calibration data.
        seconds: Time to quantize it.
        fallback: Why some or all of it was rounded to nearest instead, or None.
    """

    name: str
    bits: int
    error: float
    rtn_error: float
    reg_lambda: float
    rows: tuple[int, ...]
    seconds: float
    fallback: str | None


@dataclass(frozen=True)
class Result:
    """A finished checkpoint.

    Attributes:
        out: Its folder.
        method: The method.
        bits_per_weight: Bits per quantized weight, scales and zero points included.
        size: Bytes of all tensors.
        error: Mean of the layers' errors.
        rtn_error: Mean of the layers' errors of round-to-nearest.
        seconds: Time of the run.
        layers: Every layer, in the order of the model.
        report: All of report.json.
    """

    out: Path
    method: str
    bits_per_weight: float
    size: int
    error: float
    rtn_error: float
    seconds: float
    layers: tuple[LayerResult, ...] = field(repr=False)
    report: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, out: Path, report: dict[str, Any]) -> Result:
        """The result that `report` is of, of the checkpoint in `out`."""
        return cls(
            out=out,
            method=report["method"]["method"],
            bits_per_weight=report["size"]["bits_per_weight"],
            size=report["size"]["bytes"],
            error=report["error"],
            rtn_error=report["rtn_error"],
            seconds=report["seconds"]["total"],
            layers=tuple(_layer(site, report["quant"]["bits"]) for site in report["sites"]),
            report=report,
        )


def _layer(site: Mapping[str, Any], bits: int) -> LayerResult:
    return LayerResult(
        name=site["site"],
        bits=site.get("bits") or bits,
        error=site["error"],
        rtn_error=site["rtn_error"],
        reg_lambda=site["reg_lambda"],
        rows=tuple(site["rows"]),
        seconds=site.get("seconds", 0.0),
        fallback=site.get("fallback"),
    )

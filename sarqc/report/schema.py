"""What a report.json must hold to be shown. Users may edit the file, so it is checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from types import NoneType
from typing import Any, TypeGuard

from sarqc.errors import CheckpointError


def check(report: Mapping[str, Any], where: str) -> None:
    """`CheckpointError` naming the first value of a report that is missing or of another kind; more keys are fine."""
    _fields(report, _REPORT, where, optional=("effort", "blocks", "quality", "source"))
    _fields(report["quant"], {"bits": _number, "group_size": _number, "sym": _flag}, f"{where}: quant")
    _fields(report["method"], {"method": _string}, f"{where}: method")
    _fields(report["size"], dict.fromkeys(SIZES, _number), f"{where}: size")
    if report["quant"].get("avg_bits") is not None:
        _fields(report["quant"], {"avg_bits": _number, "bit_options": _counts}, f"{where}: quant")
    for index, site in enumerate(report["sites"]):
        _fields(site, _SITE, f"{where}: sites[{index}]", optional=("damping", "bits", "correction_share"))
    for index, block in enumerate(report.get("blocks", [])):
        _fields(block, {"index": _number, "seconds": _numbers}, f"{where}: blocks[{index}]")
    for index, entry in enumerate(report.get("quality", [])):
        _fields(entry, _QUALITY, f"{where}: quality[{index}]", optional=_QUALITY.keys() - {"text", "after"})
    if report["calibration"]:
        _fields(report["calibration"], _CALIBRATION, f"{where}: calibration")


Kind = Callable[[object], bool]


def _is(*kinds: type) -> Kind:
    return lambda value: isinstance(value, kinds)


_string, _flag, _list, _mapping, _either = _is(str), _is(bool), _is(list), _is(dict), _is(dict, NoneType)


def _number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: object) -> bool:
    return _number(value) and value > 0


def _or_none(fits: Kind) -> Kind:
    return lambda value: value is None or fits(value)


def _numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and n >= 0 for n in value)


def _texts(value: object) -> bool:
    return isinstance(value, dict) and all(map(_string, value.values()))


def _targets(value: object) -> bool:
    return (
        isinstance(value, dict)
        and _texts(value.get("ignored", {}))
        and _texts(value.get("left", {}))
        and isinstance(value.get("untouched", []), list)
        and all(map(_string, value.get("untouched", [])))
        and _number(value.get("quantized"))
    )


def _source(value: object) -> bool:
    return isinstance(value, dict) and _number(value.get("bytes", 0))


SIZES = ("bytes", "quantized_weights", "quantized_bytes", "bits_per_weight")
_CALIBRATION: dict[str, Kind] = {"text": _string, "windows": _number, "seqlen": _number}
_QUALITY: dict[str, Kind] = {
    "text": _string,
    "after": _positive,
    "before": _or_none(_positive),
    **dict.fromkeys(("agreement", "kl", "windows", "seqlen"), _or_none(_number)),
}
_SITE: dict[str, Kind] = {
    "site": _string,
    "rows": _counts,
    "error": _number,
    "rtn_error": _number,
    "reg_lambda": _number,
    "damping": _number,
    "bits": _number,
    "correction_share": _number,
}
_REPORT: dict[str, Kind] = {
    "model": _string,
    "quant": _mapping,
    "method": _mapping,
    "calibration": _either,
    "targets": _targets,
    "size": _mapping,
    "error": _number,
    "rtn_error": _number,
    "fallbacks": _texts,
    "seconds": _numbers,
    "peak_memory_mib": _numbers,
    "device": _string,
    "versions": _texts,
    "sites": _list,
    "effort": _string,
    "blocks": _list,
    "quality": _list,
    "source": _source,
}


def _fields(values: object, kinds: Mapping[str, Kind], where: str, optional: Collection[str] = ()) -> None:
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} holds no mapping: it was not written by `sarqc quantize`")
    for key, fits in kinds.items():
        if key not in values:
            if key in optional:
                continue
            raise CheckpointError(f"{where} has no {key!r}: it was not written by `sarqc quantize`, or was cut")
        if not fits(values[key]):
            raise CheckpointError(f"{where}: {key!r} is not what a report holds there")

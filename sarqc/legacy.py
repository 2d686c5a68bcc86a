"""Names that earlier versions wrote into reports, read as the present ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sarqc.methods import METHODS, OLD_METHODS

_QUANT = {"choices": "bit_options"}
_METHOD = {
    "strength": "reg_lambda",
    "sweeps": "cd_passes",
    "carry_error": "error_correction",
    "borrow": "expert_shrinkage",
    "gate_weight": "router_weight_power",
    "grid": "scales",
}
_SITE = {
    "rounding_error": "rtn_error",
    "strength": "reg_lambda",
    "borrowed_rows": "prior_rows",
    "carried": "correction_share",
}
_SECONDS = {"look": "sensitivity"}
_DERIVED = ("gram", "solver", "channel_scale", "seed")
"""What a method's name says now, and the seed, which belongs to the calibration data."""


def quant(values: Mapping[str, Any]) -> dict[str, Any]:
    """A record of `QuantConfig`."""
    return {_QUANT.get(name, name): value for name, value in values.items()}


def method(values: Mapping[str, Any]) -> dict[str, Any]:
    """A record of `MethodConfig`."""
    found = {_METHOD.get(name, name): value for name, value in values.items() if name not in _DERIVED}
    name = found.get("method")
    if isinstance(name, str) and name not in METHODS:
        found["method"] = OLD_METHODS.get(name, name)
    return found


def site(values: Mapping[str, Any]) -> dict[str, Any]:
    """A record of `LayerReport`."""
    return {_SITE.get(name, name): value for name, value in values.items()}


def report(values: dict[str, Any]) -> dict[str, Any]:
    """A report.json; what is no mapping where one should be is left for the check."""
    found = dict(values)
    if "rounding_error" in found:
        found.setdefault("rtn_error", found.pop("rounding_error"))
    if isinstance(found.get("sites"), list):
        found["sites"] = [site(each) if isinstance(each, dict) else each for each in found["sites"]]
    if isinstance(found.get("seconds"), dict):
        found["seconds"] = {_SECONDS.get(name, name): spent for name, spent in found["seconds"].items()}
    if isinstance(found.get("quant"), dict):
        found["quant"] = quant(found["quant"])
    if isinstance(found.get("solve"), dict):
        solve = found.pop("solve")
        found.setdefault("method", method(solve))
        if isinstance(found.get("calibration"), dict):
            found["calibration"] = {"seed": solve.get("seed", 0)} | found["calibration"]
    return found

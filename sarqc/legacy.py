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
    renamed = {_METHOD.get(name, name): value for name, value in values.items() if name not in _DERIVED}
    name = renamed.get("method")
    if isinstance(name, str) and name not in METHODS:
        renamed["method"] = OLD_METHODS.get(name, name)
    return renamed


def site(values: Mapping[str, Any]) -> dict[str, Any]:
    """A record of `LayerReport`."""
    return {_SITE.get(name, name): value for name, value in values.items()}


def report(values: dict[str, Any]) -> dict[str, Any]:
    """A report.json; what is no mapping where one should be is left for the check."""
    renamed = dict(values)
    if "rounding_error" in renamed:
        renamed.setdefault("rtn_error", renamed.pop("rounding_error"))
    if isinstance(renamed.get("sites"), list):
        renamed["sites"] = [site(each) if isinstance(each, dict) else each for each in renamed["sites"]]
    if isinstance(renamed.get("seconds"), dict):
        renamed["seconds"] = {_SECONDS.get(name, name): spent for name, spent in renamed["seconds"].items()}
    if isinstance(renamed.get("quant"), dict):
        renamed["quant"] = quant(renamed["quant"])
    if isinstance(renamed.get("solve"), dict):
        solve = renamed.pop("solve")
        renamed.setdefault("method", method(solve))
        if isinstance(renamed.get("calibration"), dict):
            renamed["calibration"] = {"seed": solve.get("seed", 0)} | renamed["calibration"]
    return renamed

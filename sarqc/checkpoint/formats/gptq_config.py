"""Reading the `quantization_config` of a GPTQ checkpoint: which numbers a Linear has, and what is refused.

Files differ by writer: `checkpoint_format` is called `format` by newer ones and is missing in old ones, which are v1.
`dynamic` changes the numbers of single layers: the first regular expression that matches a name from its start wins;
"-:" before it says that such layers are not quantized, "+:" or nothing gives other numbers for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sarqc.checkpoint.formats.common import compiled, group_size_of
from sarqc.errors import CheckpointError

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"


@dataclass(frozen=True)
class Scheme:
    """How one Linear is stored. group_size -1: one group per row. v2: zeros as they are, and not less one."""

    bits: int
    group_size: int
    sym: bool
    v2: bool


def method_of(quantization: Mapping[str, Any]) -> object:
    """Name of the method; newer files of GPTQModel call it `method`."""
    return quantization.get("quant_method", quantization.get("method"))


def version_of(quantization: Mapping[str, Any]) -> object:
    """What the config calls its layout; v1 where it says nothing."""
    return quantization.get("checkpoint_format") or quantization.get("format") or V1


def check_config(quantization: Mapping[str, Any]) -> None:
    """Refuses a config that says something about the weights that is not understood here."""
    if quantization.get("is_marlin_format"):
        raise CheckpointError(
            "GPTQ weights in Marlin's order are not read (is_marlin_format): give the GPTQ checkpoint"
        )
    if (version := version_of(quantization)) not in (V1, V2):
        raise CheckpointError(f"GPTQ checkpoint_format {version!r} is not read: only {V1!r} and {V2!r} are")
    if (words := quantization.get("pack_dtype", "int32")) != "int32":
        raise CheckpointError(f"pack_dtype {words!r} is not read: only 'int32' is")
    _scheme(quantization, quantization)
    for _, numbers in _dynamic(quantization):
        if numbers is not None:
            _scheme(numbers, quantization)


def scheme_of(linear: str, quantization: Mapping[str, Any]) -> Scheme:
    """The scheme of `linear`."""
    for pattern, numbers in _dynamic(quantization):
        if pattern.match(linear):
            if numbers is None:
                raise CheckpointError(f"{linear!r} is quantized, where dynamic in quantization_config says it is not")
            return _scheme(numbers, quantization)
    return _scheme(quantization, quantization)


def left_out(quantization: Mapping[str, Any]) -> tuple[str, ...]:
    """Names that `dynamic` leaves unquantized, where a pattern is a name and no more, and `lm_head` as the key says."""
    names = [] if quantization.get("lm_head") else ["lm_head"]
    for pattern, numbers in _dynamic(quantization):
        name = re.sub(r"\\(.)", r"\1", pattern.pattern.removeprefix("^").removesuffix("$"))
        if numbers is None and pattern.pattern == exactly(name):
            names.append(name)
    return tuple(names)


def exactly(name: str) -> str:
    """The pattern that matches `name` alone."""
    return f"^{re.escape(name)}$"


def _dynamic(quantization: Mapping[str, Any]) -> Iterator[tuple[re.Pattern[str], Mapping[str, Any] | None]]:
    """Patterns and the numbers they give; None for layers that are not quantized."""
    rules = quantization.get("dynamic") or {}
    if not isinstance(rules, dict):
        raise CheckpointError(f"dynamic in quantization_config is {rules!r}, where an object is expected")
    for rule, numbers in rules.items():
        pattern = compiled(rule.removeprefix("-:").removeprefix("+:"), f"{rule!r} under dynamic")
        if not rule.startswith("-:") and not isinstance(numbers, dict):
            raise CheckpointError(f"{rule!r} under dynamic gives {numbers!r}, where an object is expected")
        yield pattern, None if rule.startswith("-:") else numbers


def _scheme(numbers: Mapping[str, Any], base: Mapping[str, Any]) -> Scheme:
    bits, group_size, sym = (
        numbers.get(key, base.get(key, default)) for key, default in (("bits", None), ("group_size", -1), ("sym", True))
    )
    if type(bits) is not int or bits not in BITS or type(sym) is not bool:
        raise CheckpointError(f"GPTQ weights with bits {bits!r}, sym {sym!r} are not read: bits 2, 3, 4 and 8 are")
    return Scheme(bits, group_size_of(group_size), sym, version_of(base) == V2)

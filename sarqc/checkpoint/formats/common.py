"""What all formats share: the look at a weight before it is packed, and at a set of tensors before it is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from sarqc.checkpoint.formats.base import TensorInfo
from sarqc.config import QuantConfig
from sarqc.conventions import FUSED_NAMES
from sarqc.errors import CheckpointError, NumericError
from sarqc.method.weight import QuantizedWeight


def check_weight(linear: str, weight: QuantizedWeight, quant: QuantConfig) -> None:
    """`CheckpointError` where `weight` is not one matrix as `quant` says; `NumericError` for a scale not finite."""
    if weight.codes.ndim != 3 or weight.codes.shape[0] != 1:
        raise CheckpointError(f"{linear!r} has codes of shape {tuple(weight.codes.shape)}: write one expert at a time")
    rows, columns = weight.codes.shape[1:]
    groups = (1, rows, quant.groups(columns))
    if weight.bits != quant.bits or tuple(weight.scales.shape) != groups or weight.zeros.shape != weight.scales.shape:
        raise CheckpointError(
            f"{linear!r} has {weight.bits} bits, scales {tuple(weight.scales.shape)} and zeros "
            f"{tuple(weight.zeros.shape)}, where {quant.bits} bits and {groups} are to be written"
        )
    if quant.sym and not weight.sym:
        raise CheckpointError(f"{linear!r} has zeros off the middle code, which a symmetric checkpoint cannot hold")
    if not bool(weight.scales.isfinite().all()):
        raise NumericError(f"{linear!r} has a scale that is not finite: its weights or activations were not")


def check_uniform_bits(quant: QuantConfig, name: str) -> None:
    """`CheckpointError` where layers have different widths, for a format `name` whose config has one for all."""
    if quant.avg_bits is not None:
        raise CheckpointError(
            f"avg_bits = {quant.avg_bits} cannot be held by {name}: its config has one width for all layers; "
            "use format compressed-tensors"
        )


def outside_blocks(linears: Iterable[str]) -> list[str]:
    """Those that are in no decoder block: names of what is in one have its number."""
    return [linear for linear in linears if not re.search(r"\.\d+\.", linear)]


def check_scale_dtype(linear: str, dtype: torch.dtype, accepted: tuple[torch.dtype, ...], name: str) -> None:
    """`CheckpointError` for scales of a dtype that the format `name` has no place for."""
    if dtype not in accepted:
        names = " or ".join(str(kind).removeprefix("torch.") for kind in accepted)
        raise CheckpointError(
            f"{linear!r} has scales of {str(dtype).removeprefix('torch.')}, where {name} holds {names}"
        )


def complete_linears(
    pattern: re.Pattern[str], names: Iterable[str], parts: Callable[[str], set[str]], whose: str
) -> dict[str, tuple[str, ...]]:
    """The quantized Linears among `names` and their tensors, sorted; `CheckpointError` for a set that is not whole.

    pattern: of a packed tensor's name, with the groups `linear` and `part`. parts(linear): what belongs to one, and a
    plain weight beside it does not. whose: says who asks for that, in the message.
    """
    every = set(names)
    parts_of: dict[str, set[str]] = {}
    for name in sorted(every):
        if match := pattern.fullmatch(name):
            parts_of.setdefault(match["linear"], set()).add(match["part"])
    for linear, stored in parts_of.items():
        expected, plain = parts(linear), f"{linear}.weight" in every
        if stored != expected or plain:
            raise CheckpointError(
                f"{linear!r} is stored as {', '.join([*sorted(stored), *['weight'] * plain])}, where {whose} "
                f"{', '.join(sorted(expected))}"
            )
    return {linear: tuple(f"{linear}.{part}" for part in sorted(stored)) for linear, stored in parts_of.items()}


def group_size_of(value: object) -> int:
    """A config's group size, -1 for one group per row; `CheckpointError` for anything else."""
    if type(value) is not int or (value != -1 and value < 1):
        raise CheckpointError(f"group_size {value!r} is not read: use a number from 1 up, or -1")
    return value


def compiled(pattern: str, message: str) -> re.Pattern[str]:
    """A config's regular expression; `CheckpointError` beginning with `message` for what is none."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{message} is no regular expression: {error}") from error


def check_tensor(
    linear: str, part: str, tensor: TensorInfo, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], why: str
) -> None:
    """`CheckpointError` where a tensor has not this shape and one of these dtypes; `why` says what asks for it."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(
            f"{part} of {linear!r} is {describe_tensor(tensor)}, where {why} needs {wanted} {list(shape)}"
        )


def describe_tensor(tensor: TensorInfo) -> str:
    """Dtype and shape for a message."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def with_fused(names: Iterable[str]) -> list[str]:
    """Names of Linears left unquantized, each once, and behind them those of the matrices that servers make of some of
    them: SGLang asks for these alone. Not of single experts, which are part of a larger one."""
    given = dict.fromkeys(names)
    unique: dict[str, None] = {}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in given):
        if not parent.rpartition(".")[2].isdigit():
            whole = (one for one, parts in FUSED_NAMES.items() if all(f"{parent}.{part}" in given for part in parts))
            unique |= dict.fromkeys(f"{parent}.{one}" for one in whole)
    return list(given | unique)


def without_fused(names: Iterable[str]) -> list[str]:
    """The names without those that `with_fused` adds to the others."""
    given = list(names)
    parts = [name for name in given if name.rpartition(".")[2] not in FUSED_NAMES]
    added = set(with_fused(parts)) - set(parts)
    return [name for name in given if name not in added]


def strings(quantization: Mapping[str, Any], key: str) -> list[str]:
    """The list of strings under `key`; empty where there is none."""
    values = quantization.get(key) or []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{key} in quantization_config is {values!r}, where a list of names is expected")
    return values

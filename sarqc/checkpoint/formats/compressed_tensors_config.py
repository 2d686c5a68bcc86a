"""Reading the `quantization_config` of compressed-tensors: which numbers a Linear has, and what is refused.

Only what changes the meaning of the stored weights is looked at. Whatever is unknown there is an error: a reader that
guesses returns wrong weights without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sarqc.checkpoint.formats.common import compiled, strings
from sarqc.errors import CheckpointError

LAYOUT = "pack-quantized"
_STACKED = re.compile(r"(.*?\.\d+\..*?)\.\d+\.")
"""Up to the second number in a name, which is an expert's; the first is the block's."""


@dataclass(frozen=True)
class Scheme:
    """How one Linear is stored. group_size -1: one group per row. version: of the package that wrote it, or None."""

    bits: int
    group_size: int
    sym: bool
    version: str | None


def check_config(quantization: Mapping[str, Any]) -> None:
    """Refuses a config that says something about the weights that is not understood here."""
    layout = quantization.get("format")
    if layout not in (LAYOUT, "mixed-precision"):
        raise CheckpointError(f"compressed-tensors format {layout!r} is not read: only {LAYOUT!r} is")
    if (status := quantization.get("quantization_status", "compressed")) != "compressed":
        raise CheckpointError(f"quantization_status {status!r} is not read: only 'compressed' is")
    for key in ("sparsity_config", "transform_config"):
        extra = quantization.get(key)
        # The package writes an empty object, or a dense sparsity_config, for "nothing of the kind".
        if extra and not (isinstance(extra, dict) and extra.get("format") == "dense" and key == "sparsity_config"):
            raise CheckpointError(f"{key} in quantization_config is not empty: sparse or rotated weights are not read")
    for _, targets, group in _groups(quantization):
        for target in targets:
            if target.startswith("re:"):
                _pattern(target)
        _scheme(group, quantization)


def scheme_of(linear: str, quantization: Mapping[str, Any]) -> Scheme:
    """The scheme of `linear`: a target that is its name wins over one that is a pattern, and that over a class."""
    best: tuple[int, Mapping[str, Any]] | None = None
    for _, targets, group in _groups(quantization):
        for target in targets:
            rank = _rank(target, linear)
            if rank is not None and (best is None or rank < best[0]):
                best = (rank, group)
    if best is None:
        raise CheckpointError(f"{linear!r} holds packed weights but no target in quantization_config matches it")
    return _scheme(best[1], quantization)


def takes(module: str, quantization: Mapping[str, Any]) -> bool:
    """Whether readers of the config take the Linear that their model calls `module` for quantized."""
    if any(_rank(entry, module) is not None for entry in strings(quantization, "ignore")):
        return False
    return any(_rank(target, module) is not None for _, targets, _ in _groups(quantization) for target in targets)


def targets_by_width(widths: Mapping[str, int]) -> dict[int, list[str]]:
    """Targets of a config group for each width, falling, that give every Linear of `widths` its own.

    Names are given in full, which all readers match alike, also where they fuse what is named. The experts of a layer,
    names that differ in a second number only, are one pattern: a server's own name for a projection need not be the
    checkpoint's. The class "Linear" is in no group, because some readers ask for it before they ask for parts. The
    widest group comes first because transformers takes the experts of all layers to be as in the first group that names
    any: too few words for that width are an error, too many would be wrong weights without a word.
    """
    stacks: dict[str, set[int]] = {}
    for linear, width in widths.items():
        if match := _STACKED.match(linear):
            stacks.setdefault(match[1], set()).add(width)
    by_width: dict[int, dict[str, None]] = {width: {} for width in sorted(set(widths.values()), reverse=True)}
    for linear, width in widths.items():
        match = _STACKED.match(linear)
        alike = match is not None and len(stacks[match[1]]) == 1
        by_width[width][f"re:{re.escape(match[1])}\\.\\d+\\..*" if match and alike else linear] = None
    return {width: list(targets) for width, targets in by_width.items()}


def is_padded(scheme: Scheme, count: int, words: int) -> bool:
    """Whether `count` codes in `words` words lie as compressed-tensors before 0.18 wrote them, floor(32 / b) to a word.

    The number of words tells wherever the two layouts differ in it, which from 192 codes on they always do; only where
    they do not is the version asked. Codes of 2, 4 and 8 bits never changed.
    """
    dense, padded = -(-count * scheme.bits // 32), -(-count // (32 // scheme.bits))
    if 32 % scheme.bits == 0 or count <= 32 // scheme.bits or words != padded:
        return False
    if dense != padded or scheme.version is None:
        return dense != padded
    numbers = re.match(r"(\d+)\.(\d+)", scheme.version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < (0, 18)


def _groups(quantization: Mapping[str, Any]) -> Iterator[tuple[str, list[str], Mapping[str, Any]]]:
    """Name, targets and content of each config group."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError("quantization_config has no config_groups")
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise CheckpointError(
                f"config group {name!r} is a preset's name or a list, which is not read: spell it out"
            )
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise CheckpointError(f"config group {name!r} has targets {targets!r}, where a list of names is expected")
        yield name, targets, group


def _rank(target: str, linear: str) -> int | None:
    """How closely `target` matches: 0 the name itself, 1 a pattern, 2 the class; None for no match."""
    if target.startswith("re:"):
        return 1 if _pattern(target).match(linear) else None
    return 0 if target == linear else 2 if target == "Linear" else None


def _pattern(target: str) -> re.Pattern[str]:
    return compiled(target.removeprefix("re:"), f"target {target!r} in quantization_config")


def _scheme(group: Mapping[str, Any], quantization: Mapping[str, Any]) -> Scheme:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise CheckpointError("a config group of quantization_config says nothing about weights")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise CheckpointError(f"quantization_config has {key}: only weights may be quantized")
    layout = group.get("format") or quantization.get("format")
    if layout != LAYOUT:
        raise CheckpointError(f"compressed-tensors format {layout!r} is not read: only {LAYOUT!r} is")
    bits, group_size, sym = weights.get("num_bits"), weights.get("group_size"), weights.get("symmetric", True)
    if weights.get("dynamic"):
        raise CheckpointError("weights with dynamic scales are not read: their scales are not in the file")
    if weights.get("type", "int") != "int" or type(bits) is not int or not 2 <= bits <= 8 or type(sym) is not bool:
        raise CheckpointError(
            f"weights of type {weights.get('type')!r} with num_bits {bits!r}, symmetric {sym!r} are not read: "
            "only int with 2 to 8 bits is"
        )
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise CheckpointError(f"actorder {weights['actorder']!r} is not read: it needs a g_idx, which serving dropped")
    strategy = weights.get("strategy") or ("channel" if group_size == -1 else "group")
    if strategy == "channel" and group_size in (None, -1):
        group_size = -1
    elif strategy != "group" or type(group_size) is not int or group_size < 1:
        raise CheckpointError(f"strategy {strategy!r} with group_size {group_size!r} is not read: use group or channel")
    version = quantization.get("version")
    return Scheme(bits, group_size, sym, version if isinstance(version, str) else None)

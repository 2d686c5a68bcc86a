"""What will be quantized, decided from names and shapes before any weight is read.

Targeted is every Linear of the decoder blocks, and every matrix of their experts, under the name the checkpoint has
for it. Left alone are

- whatever stands outside the blocks (embeddings, `lm_head`, norms), or is no part of the model that transformers
  builds;
- routers: a Linear whose name says so (`gate`, `router`, or a name that ends in `_gate` or `_router`, or one inside a
  module called `router`) *and* whose output is one number, or one per expert of its block. `gate_proj` is no router;
- what a regular expression of `QuantConfig.ignore` finds; one that finds no Linear of the model is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from sarqc.config import QuantConfig
from sarqc.errors import ArgumentError, ModelError
from sarqc.model import moe
from sarqc.model.lazy_model import Skeleton

GROUP_SIZES = (128, 64, 32)
_ROUTER = re.compile(r"(^|_)(gate|router)$")


@dataclass(frozen=True)
class Target:
    """One matrix to quantize.

    linear: its name in the checkpoint, without ".weight". shape: (out, in). block: index of its decoder block.
    module, parameter: full names in the model. Rows start .. start + out of matrix `expert` of the parameter are it.
    """

    linear: str
    shape: tuple[int, int]
    block: int
    module: str
    parameter: str
    expert: int = 0
    start: int = 0


@dataclass(frozen=True)
class Targets:
    """selected: in the order of the model. ignored: (linear, the pattern that found it). untouched: every other
    matrix of the checkpoint that somebody could take for a Linear, ignored ones and routers and `lm_head` included."""

    selected: tuple[Target, ...]
    ignored: tuple[tuple[str, str], ...]
    untouched: tuple[str, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the targeted layers, without ".weight"."""
        return tuple(target.linear for target in self.selected)

    @cached_property
    def _by_block(self) -> dict[int, list[Target]]:
        found: dict[int, list[Target]] = {}
        for target in self.selected:
            found.setdefault(target.block, []).append(target)
        return found

    def of_block(self, index: int) -> list[Target]:
        """Targets of one decoder block."""
        return self._by_block.get(index, [])

    @property
    def first_block(self) -> int:
        """The first decoder block that has targets."""
        return self.selected[0].block

    def record(self) -> dict[str, Any]:
        """For a report: how many are quantized, and what is not and why."""
        return {
            "quantized": len(self.selected),
            "weights": sum(out * inputs for out, inputs in (target.shape for target in self.selected)),
            "ignored": dict(self.ignored),
            "untouched": list(self.untouched),
        }


def targets(skeleton: Skeleton, quant: QuantConfig) -> Targets:
    """The layers that `quant` takes; its group size is not looked at.

    Raises `ModelError` for experts that cannot be quantized, with the reason, and for a model without a Linear;
    `ArgumentError` for an ignore pattern that is no regular expression or finds nothing.
    """
    patterns = [_compiled(pattern) for pattern in quant.ignore]
    selected: list[Target] = []
    ignored: list[tuple[str, str]] = []
    for index in range(len(skeleton.blocks)):
        for target, refusal in _candidates(skeleton, index):
            pattern = next((p.pattern for p in patterns if p.search(target.linear)), None)
            if pattern is not None:
                ignored.append((target.linear, pattern))
            elif refusal is not None:
                raise ModelError(f"{target.linear} cannot be quantized: {refusal}; leave it with an ignore pattern")
            else:
                selected.append(target)
    names = {target.linear for target in selected}
    untouched = [name for name in _matrices(skeleton) if name not in names]
    for compiled in patterns:
        if not any(compiled.search(name) for name in (*untouched, *(linear for linear, _ in ignored))):
            raise ArgumentError(
                f"ignore = {compiled.pattern!r} finds no Linear of the model; "
                f"names look like {next(iter(names), '?')!r}"
            )
    if not selected:
        raise ModelError(f"{type(skeleton.model).__name__} has no Linear left to quantize in its blocks")
    return Targets(tuple(selected), tuple(ignored), tuple(untouched))


def auto_group_size(found: Targets) -> int:
    """The largest of 128, 64, 32 that divides every targeted layer's inputs; `ArgumentError` naming a layer if none."""
    for group_size in GROUP_SIZES:
        if all(target.shape[1] % group_size == 0 for target in found.selected):
            return group_size
    odd = next(target for target in found.selected if target.shape[1] % GROUP_SIZES[-1])
    raise ArgumentError(
        f"group_size = 'auto' has no answer: {odd.linear} has {odd.shape[1]} inputs, which 32 does not divide; "
        "use -1 (one scale per row), a size that fits, or ignore that layer"
    )


def check_group_size(found: Targets, quant: QuantConfig) -> None:
    """`ArgumentError`, with a layer and what would fit, where the group size does not divide some layer's inputs."""
    odd = next((target for target in found.selected if not quant.divides(target.shape[1])), None)
    if odd is None:
        return
    fitting = [g for g in GROUP_SIZES if all(target.shape[1] % g == 0 for target in found.selected)]
    advice = f"use {', '.join(map(str, fitting))} or -1" if fitting else "use -1 (one scale per row)"
    raise ArgumentError(
        f"group_size = {quant.group_size} does not divide the {odd.shape[1]} inputs of {odd.linear}: {advice}, "
        "or ignore that layer"
    )


def _candidates(skeleton: Skeleton, index: int) -> Iterator[tuple[Target, str | None]]:
    """Every Linear and expert matrix of a block except routers, with the reason why it cannot be quantized, if any."""
    block, start = skeleton.blocks[index], f"{skeleton.prefix}.{index}"
    if (unknown := moe.undeclared(block)) is not None:
        raise ModelError(
            f"{start}.{unknown} holds 3-D weights that transformers calls through no experts function; "
            "such layers cannot be quantized"
        )
    outputs = {1} | {moe.matrices(module) for module in block.modules() if moe.is_experts(module)}
    for path, module in block.named_modules():
        name = f"{start}.{path}"
        if isinstance(module, nn.Linear) and not _is_router(path, module, outputs):
            target = _dense(skeleton, index, name, module)
            strange = type(module).forward is not nn.Linear.forward
            yield target, f"{type(module).__name__} is not a plain Linear" if strange else None
        elif moe.is_experts(module):
            for projection in moe.projections(module):
                yield from _stacked(skeleton, index, name, module, projection)


def _dense(skeleton: Skeleton, index: int, name: str, module: nn.Linear) -> Target:
    parameter = f"{name}.weight"
    pieces = skeleton.pieces.get(parameter)
    if pieces is None or len(pieces) != 1 or pieces[0].linear is None:
        raise ModelError(f"{parameter!r} is not one tensor called *.weight in the checkpoint, so it cannot be replaced")
    return Target(pieces[0].linear, (module.out_features, module.in_features), index, name, parameter)


def _stacked(
    skeleton: Skeleton, index: int, name: str, module: Any, projection: str
) -> Iterator[tuple[Target, str | None]]:
    parameter = f"{name}.{projection}"
    inputs = getattr(module, projection).shape[1 if module.is_transposed else 2]
    for piece in skeleton.pieces[parameter]:
        refusal = moe.why_not(module, per_expert_names=piece.expert is not None and piece.linear is not None)
        linear = piece.linear or piece.name
        yield Target(linear, (piece.rows, inputs), index, name, parameter, piece.expert or 0, piece.start), refusal


def _is_router(path: str, module: nn.Linear, outputs: set[int]) -> bool:
    named = bool(_ROUTER.search(path.rpartition(".")[2])) or "router" in path.split(".")
    return named and module.out_features in outputs


def _matrices(skeleton: Skeleton) -> list[str]:
    """Names of all matrices of the checkpoint that are not embeddings, and of Linears that are tied to one; those that
    the model has no use for too: a server may have one."""
    names: dict[str, None] = {}
    for parameter, pieces in skeleton.pieces.items():
        path, _, _ = parameter.rpartition(".")
        module = skeleton.model.get_submodule(path)
        matrix = skeleton.model.get_parameter_or_buffer(parameter).dim() == 2 or moe.is_experts(module)
        if matrix and not isinstance(module, nn.Embedding):
            names |= dict.fromkeys(piece.linear or piece.name for piece in pieces)
    for path, module in skeleton.model.named_modules():
        if isinstance(module, nn.Linear) and f"{path}.weight" not in skeleton.pieces:
            names[path] = None
    names |= dict.fromkeys(name for name in skeleton.unused if "embed" not in name.rpartition(".")[2])
    return list(names)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ArgumentError(f"ignore = {pattern!r} is not a regular expression: {error}") from error

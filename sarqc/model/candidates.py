"""Every matrix of the decoder blocks, and why one is left or cannot be quantized."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from sarqc.model import moe
from sarqc.model.lazy_model import Skeleton

NARROWEST = 32
"""Inputs of the narrowest layer that is quantized: the smallest group size that servers take."""

_ROUTER = re.compile(r"(^|_)(gate|router)$")
_NO_MATRICES = (nn.Embedding, nn.modules.conv._ConvNd)


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

    @property
    def elements(self) -> int:
        """Weights in it."""
        return prod(self.shape)

    @property
    def names(self) -> tuple[str, str]:
        """What it is called in the checkpoint and in the model."""
        return self.linear, self.parameter.removesuffix(".weight")


@dataclass(frozen=True)
class Candidate:
    """A matrix of a block. rule: why it is left, where a rule leaves it. refusal: why it cannot be quantized."""

    target: Target
    rule: str | None = None
    refusal: str | None = None


def candidates(skeleton: Skeleton) -> Iterator[Candidate]:
    """Every matrix of every block that multiplies activations, in the order of the model."""
    for index, block in enumerate(skeleton.blocks):
        outputs = {moe.matrices(module) for module in block.modules() if moe.is_experts(module)}
        for path, module in block.named_modules():
            name = f"{skeleton.prefix}.{index}.{path}"
            if isinstance(module, nn.Linear):
                yield from _linear(skeleton, index, name, module, outputs)
            elif moe.is_experts(module):
                for projection in moe.projections(module):
                    yield from _stacked(skeleton, index, name, module, projection)
            elif not isinstance(module, _NO_MATRICES):
                yield from _bare(skeleton, index, name, module, outputs)


def _linear(skeleton: Skeleton, index: int, name: str, module: nn.Linear, outputs: set[int]) -> Iterator[Candidate]:
    """A Linear, which is one matrix of the checkpoint, or several whose rows are concatenated."""
    parameter = f"{name}.weight"
    pieces = skeleton.pieces.get(parameter, ())
    whole = Target(name, (module.out_features, module.in_features), index, name, parameter)
    rule = _rule(skeleton, whole, outputs)
    if rule is None and (seen := skeleton.usage) and parameter in seen.multiplied and name not in seen.called:
        rule = "its weight is multiplied by other code than its own"
    strange = type(module).forward is not nn.Linear.forward and not _multiplies(module)
    refusal = f"{type(module).__name__} is not a plain Linear" if strange else None
    if not pieces or pieces[0].linear is None:
        made = pieces[0].conversion if pieces else None
        how = f"transformers makes it from {pieces[0].name} by {made}" if made else "its weight is shared or renamed"
        yield Candidate(whole, rule, f"{how}, so the checkpoint has no name for it")
        return
    for piece in pieces:
        rows = module.out_features if piece.expert is None else piece.rows
        target = Target(piece.linear or piece.name, (rows, module.in_features), index, name, parameter, 0, piece.start)
        yield Candidate(target, rule, refusal)


def _stacked(skeleton: Skeleton, index: int, name: str, module: Any, projection: str) -> Iterator[Candidate]:
    parameter = f"{name}.{projection}"
    weight: Tensor = getattr(module, projection)
    inputs = weight.shape[1 if module.is_transposed else 2]
    for piece in skeleton.pieces[parameter]:
        rows = piece.rows or weight.numel() // inputs // len(skeleton.pieces[parameter])
        refusal = moe.why_not(module, per_expert_names=piece.expert is not None and piece.linear is not None)
        where = (piece.expert or 0, piece.start)
        yield Candidate(
            Target(piece.linear or piece.name, (rows, inputs), index, name, parameter, *where), None, refusal
        )


def _bare(skeleton: Skeleton, index: int, name: str, module: nn.Module, outputs: set[int]) -> Iterator[Candidate]:
    """Matrices that are parameters of a module which is neither a Linear nor a declared experts module."""
    seen = skeleton.usage
    for leaf, weight in module.named_parameters(recurse=False):
        parameter = f"{name}.{leaf}"
        used = weight.dim() in (2, 3) and min(weight.shape) > 1 if seen is None else parameter in seen.multiplied
        pieces = skeleton.pieces.get(parameter, ())
        if weight.dim() < 2 or not used or not pieces:
            continue
        stored = (pieces[0].linear or pieces[0].name) if len(pieces) == 1 else parameter
        inputs = weight.shape[-1]
        target = Target(stored, (weight.numel() // inputs, inputs), index, name, parameter)
        refusal = f"it is a {weight.dim()}-D parameter of {type(module).__name__}, which is no Linear"
        yield Candidate(target, _rule(skeleton, target, outputs), refusal)


def _rule(skeleton: Skeleton, target: Target, outputs: set[int]) -> str | None:
    """The rule that leaves a matrix outside the experts, or None."""
    rows, inputs = target.shape
    if rows == 1:
        return "it has one output"
    if skeleton.usage is not None and target.parameter in skeleton.usage.selectors:
        return "its outputs choose experts or positions"
    path = target.module.split(".")
    if rows in outputs and (_ROUTER.search(path[-1]) or "router" in path):
        return "it has a router's name and one output for each expert"
    if skeleton.stays_in_fp32(target.parameter):
        return "the model keeps it in fp32"
    return f"it has fewer than {NARROWEST} inputs" if inputs < NARROWEST else None


@torch.no_grad()
def _multiplies(module: nn.Linear) -> bool:
    """Whether a subclass of Linear with a forward of its own does what Linear does, tried on numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, module.in_features, generator=generator)
    parameters = {
        name: None if there is None else nn.Parameter(torch.randn(there.shape, generator=generator))
        for name, there in module._parameters.items()
    }
    tried = object.__new__(type(module))
    tried.__dict__ = module.__dict__ | {"_parameters": parameters}
    try:
        found = tried(x)
    except Exception:  # noqa: BLE001  # a forward that takes something else is none of Linear's
        return False
    weight = parameters["weight"]
    assert weight is not None
    wanted = nn.functional.linear(x, weight, parameters["bias"])
    return isinstance(found, Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, 1e-4, 1e-4)

"""Every matrix of the decoder blocks, and those outside of them; why one is left or cannot be quantized."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from sarqc.model import moe
from sarqc.model.lazy_model import LazyModel
from sarqc.model.trial import computes
from sarqc.model.weight_map import tied_to

NARROWEST = 32
"""Inputs of the narrowest layer that is quantized: the smallest group size that servers take."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_ROUTER = re.compile(r"(^|_)(gate|router)$")
_NO_MATRICES = (nn.Embedding, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Target:
    """One matrix to quantize.

    linear: its name in the checkpoint, without ".weight". shape: (out, in). block: index of its decoder block, or of
    the unit that it is outside of them. module, parameter: full names in the model. Rows start .. start + out of matrix
    `expert` of the parameter are it. embedding: whether it is looked up in, row by row.
    """

    linear: str
    shape: tuple[int, int]
    block: int
    module: str
    parameter: str
    expert: int = 0
    start: int = 0
    embedding: bool = False

    @property
    def elements(self) -> int:
        """Weights in it."""
        return prod(self.shape)

    @property
    def names(self) -> tuple[str, str]:
        """What it is called in the checkpoint and in the model."""
        return self.linear, self.parameter.removesuffix(".weight")


Verdict = tuple[str | None, str | None]
"""Why a matrix is left, where a rule leaves it, and why it cannot be quantized."""


@dataclass(frozen=True)
class Candidate:
    """A matrix. judge: its verdict, which is not asked for where a checkpoint says what was quantized: for most rules
    the model's code has to run."""

    target: Target
    judge: Callable[[], Verdict]

    @cached_property
    def verdict(self) -> Verdict:
        """The rule that leaves it, and the reason why it cannot be quantized."""
        return self.judge()

    @property
    def rule(self) -> str | None:
        """Why it is left, where a rule leaves it."""
        return self.verdict[0]

    @property
    def refusal(self) -> str | None:
        """Why it cannot be quantized."""
        return self.verdict[1]


def candidates(lazy: LazyModel) -> Iterator[Candidate]:
    """Every matrix of every block that multiplies activations, in the order of the model."""
    for index, block in enumerate(lazy.blocks):
        outputs = {moe.matrices(module) for module in block.modules() if moe.is_experts(module)}
        for path, module in block.named_modules():
            name = f"{lazy.prefix}.{index}.{path}"
            if isinstance(module, nn.Linear):
                yield from _linear(lazy, index, name, module, outputs)
            elif moe.is_experts(module):
                for projection in moe.projections(module):
                    yield from _stacked(lazy, index, name, module, projection)
            elif not isinstance(module, _NO_MATRICES):
                yield from _bare(lazy, index, name, module, outputs)


def outside(lazy: LazyModel) -> Iterator[Candidate]:
    """Every Linear and embedding outside the blocks, first those behind them in the order in which text passes them.

    A Linear before the blocks is not quantized: when text is behind them, what it has passed before has its final
    weights. Each of the others, and each embedding, is a unit of its own.
    """
    behind = _behind(lazy)
    places = {name: len(lazy.blocks) + number for number, name in enumerate(behind)}
    modules = dict(lazy.model.named_modules())
    for name in dict.fromkeys((*behind, *modules)):
        module = modules[name]
        if name.startswith(f"{lazy.prefix}.") or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        shape = (module.weight.shape[0], module.weight.shape[1])
        whole = Target(name, shape, places.get(name, -1), name, f"{name}.weight")
        if isinstance(module, nn.Embedding):
            yield _embedding(lazy, replace(whole, block=len(lazy.blocks) + len(behind), embedding=True))
        elif (other := _tied(lazy, whole.parameter)) is not None:
            yield _refused(whole, f"its weight is that of {other} too, and cannot be taken apart from it")
        elif name in places:
            yield from _linear(lazy, places[name], name, module, set())
        else:
            why = _not_passed(lazy, whole.block, whole.parameter)
            yield _refused(whole, why or "text does not pass through it behind the last block")


def _refused(target: Target, why: str | None) -> Candidate:
    return Candidate(target, lambda: (None, why))


def _behind(lazy: LazyModel) -> list[str]:
    """Names of the Linears that text first passes behind the last block; where the model's code does not run without
    data, that is known of the output embeddings alone."""
    seen, head = lazy.usage, lazy.model.get_output_embeddings()
    if seen is None:
        return [name for name, module in lazy.model.named_modules() if module is head and isinstance(head, nn.Linear)]
    last = max((place for name, place in seen.called.items() if name.startswith(f"{lazy.prefix}.")), default=0)
    return [name for name, place in seen.called.items() if place > last]


def _embedding(lazy: LazyModel, target: Target) -> Candidate:
    """An embedding outside the blocks, by the name that the checkpoint has for it."""
    slices = lazy.slices.get(target.parameter, ())
    if (other := _tied(lazy, target.parameter)) is not None:
        return _refused(target, f"its weight is that of {other} too, and cannot be taken apart from it")
    if len(slices) != 1 or slices[0].linear is None:
        return _refused(target, "its weight is made of several tensors of the checkpoint")
    refusal = _not_passed(lazy, target.block, target.parameter) or _rule(lazy, target, set())
    if lazy.usage is None and lazy.model.get_submodule(target.module) is not lazy.model.get_input_embeddings():
        refusal = "the model's code does not run without data, so it is not known whether text passes through it"
    return _refused(replace(target, linear=slices[0].linear), refusal)


def _tied(lazy: LazyModel, parameter: str) -> str | None:
    """The module whose weight a parameter is too, or None."""
    other = tied_to(lazy.model, parameter)
    return other and other.removesuffix(".weight")


def _linear(lazy: LazyModel, index: int, name: str, module: nn.Linear, outputs: set[int]) -> Iterator[Candidate]:
    """A Linear, which is one matrix of the checkpoint, or several whose rows are concatenated."""
    parameter = f"{name}.weight"
    slices = lazy.slices.get(parameter, ())
    whole = Target(name, (module.out_features, module.in_features), index, name, parameter)
    judge = cache(partial(_judge_linear, lazy, whole, module, outputs))  # of several matrices, once
    if (other := _tied(lazy, parameter)) is not None:
        yield _otherwise(whole, judge, f"its weight is that of {other} too, and blocks are solved one by one")
        return
    if not slices or slices[0].linear is None:
        made = slices[0].conversion if slices else None
        how = f"transformers makes it from {slices[0].name} by {made}" if made else "its weight is renamed"
        yield _otherwise(whole, judge, f"{how}, so the checkpoint has no name for it")
        return
    for stored in slices:
        rows = module.out_features if stored.expert is None else stored.rows
        target = Target(
            stored.linear or stored.name, (rows, module.in_features), index, name, parameter, 0, stored.start
        )
        yield Candidate(target, judge)


def _otherwise(target: Target, judge: Callable[[], Verdict], why: str) -> Candidate:
    """Refused for another reason, unless a rule leaves it."""
    return Candidate(target, lambda: (judge()[0], why))


def _judge_linear(lazy: LazyModel, whole: Target, module: nn.Linear, outputs: set[int]) -> Verdict:
    rule = (
        _rule(lazy, whole, outputs)
        or _not_called(lazy, whole.module)
        or _not_passed(lazy, whole.block, whole.parameter)
    )
    refusal = None
    if rule is None and type(module).forward is not nn.Linear.forward and not _multiplies(module):
        if _is_block_diagonal(module):
            rule = "it is block-diagonal: each of its parts reads inputs of its own"
        refusal = f"{type(module).__name__} is not a plain Linear"
    return rule, refusal


def _stacked(lazy: LazyModel, index: int, name: str, module: Any, projection: str) -> Iterator[Candidate]:
    parameter = f"{name}.{projection}"
    weight: Tensor = getattr(module, projection)
    inputs = weight.shape[1 if module.is_transposed else 2]
    for stored in lazy.slices[parameter]:
        rows = stored.rows or weight.numel() // inputs // len(lazy.slices[parameter])
        named = stored.expert is not None and stored.linear is not None
        where = (stored.expert or 0, stored.start)
        target = Target(stored.linear or stored.name, (rows, inputs), index, name, parameter, *where)
        yield Candidate(target, partial(_judge_experts, lazy, target, module, named))


def _judge_experts(lazy: LazyModel, target: Target, module: Any, named: bool) -> Verdict:
    refusal = moe.unsupported_reason(module, per_expert_names=named)
    return _not_passed(lazy, target.block, target.parameter), refusal


def _bare(lazy: LazyModel, index: int, name: str, module: nn.Module, outputs: set[int]) -> Iterator[Candidate]:
    """Matrices that are parameters of a module which is neither a Linear nor a declared experts module."""
    for leaf, weight in module.named_parameters(recurse=False):
        parameter = f"{name}.{leaf}"
        slices = lazy.slices.get(parameter, ())
        if weight.dim() < 2 or not slices or not _is_multiplied(lazy, parameter, weight):
            continue
        stored = (slices[0].linear or slices[0].name) if len(slices) == 1 else parameter
        inputs = weight.shape[-1]
        target = Target(stored, (weight.numel() // inputs, inputs), index, name, parameter)
        yield Candidate(target, partial(_judge_bare, lazy, target, outputs))


def _is_multiplied(lazy: LazyModel, parameter: str, weight: Tensor) -> bool:
    if lazy.usage is None:
        return weight.dim() in (2, 3) and min(weight.shape) > 1
    return parameter in lazy.usage.multiplied


def _judge_bare(lazy: LazyModel, target: Target, outputs: set[int]) -> Verdict:
    rule = _rule(lazy, target, outputs)
    if rule is None and target.shape[0] < NARROWEST:  # weights that mix streams or heads
        rule = f"it is no Linear and has fewer than {NARROWEST} outputs"
    module, weight = lazy.model.get_submodule(target.module), lazy.model.get_parameter(target.parameter)
    return rule, f"it is a {weight.dim()}-D parameter of {type(module).__name__}, which is no Linear"


def _rule(lazy: LazyModel, target: Target, outputs: set[int]) -> str | None:
    """The rule that leaves a matrix outside the experts, or None."""
    rows, inputs = target.shape
    if rows == 1:
        return "it has one output"
    if lazy.usage is not None and target.parameter in lazy.usage.selectors:
        return "its outputs choose experts or positions"
    path = target.module.split(".")
    if rows in outputs and (_ROUTER.search(path[-1]) or "router" in path):
        return "it has a router's name and one output for each expert"
    if lazy.stays_in_fp32(target.parameter):
        return "the model keeps it in fp32"
    return f"it has fewer than {NARROWEST} inputs" if inputs < NARROWEST else None


def _not_called(lazy: LazyModel, name: str) -> str | None:
    seen = lazy.usage
    if seen is None or name in seen.called or f"{name}.weight" not in seen.multiplied:
        return None
    return "its weight is multiplied by other code than its own"


def _not_passed(lazy: LazyModel, index: int, parameter: str) -> str | None:
    """The rule that leaves what text does not pass through, or None.

    A layer of a block that is passed is if the one in its place in any block, or of any number in a list, is: without
    data one branch of each kind is taken.
    """
    passed = lazy.usage is None or _NUMBER.sub("*", parameter) in _kinds(lazy.usage.touched)
    passed = passed and index not in lazy.skipped
    return None if passed else "text does not pass through it"


@cache
def _kinds(names: frozenset[str]) -> frozenset[str]:
    return frozenset(_NUMBER.sub("*", name) for name in names)


def _multiplies(module: nn.Linear) -> bool:
    """Whether a subclass of Linear with a forward of its own does what Linear does, tried on numbers."""
    return computes(module, (2, 3, module.in_features), nn.functional.linear)


def _is_block_diagonal(module: nn.Linear) -> bool:
    """Whether a subclass of Linear is several matrices, each for one row of its input, tried on numbers."""
    rows, inputs = module.weight.shape

    def parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.einsum("tgk,gnk->tgn", x, weight.unflatten(0, (x.shape[1], -1)))
        return out if bias is None else out + bias.view(x.shape[1], -1)

    return any(rows % count == 0 and computes(module, (2, count, inputs), parts) for count in range(2, min(rows, 129)))

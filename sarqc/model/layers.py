"""What will be quantized, decided from names, shapes and use before any weight is read.

Targeted is every Linear of the decoder blocks, and every matrix of their experts, under the name the checkpoint has
for it. A regular expression of `QuantConfig.include` adds Linears behind the blocks, as `lm_head`, and embeddings;
what it finds outside the blocks and cannot be quantized is an error, and so is finding nothing. Left alone are

- whatever else stands outside the blocks, or is no part of the model that transformers builds;
- selectors: weights whose outputs choose experts or positions, see `sarqc.model.usage`. Where a model's code does not
  run without data, a router is told by its name (`gate`, `router`) and its width (one output per expert);
- a Linear with one output, which scales or gates a token: servers keep it in 16 bits;
- Linears whose weight is multiplied by other code than their own, block-diagonal ones, those that text does not pass
  through (cross-attention without an encoder), and Linears with fewer than 32 inputs;
- what the model keeps in fp32, and matrices with fewer than 32 outputs that no Linear holds;
- what a regular expression of `QuantConfig.ignore` finds, in the checkpoint's names or in the model's; one that finds
  no matrix of the model is an error.

Any other matrix of the blocks that cannot be quantized is an error as soon as such matrices are more than 1 % of the
weights, unless a pattern asks for them to be left.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from sarqc.config import QuantConfig
from sarqc.errors import ArgumentError, ModelError
from sarqc.model import moe
from sarqc.model.candidates import Candidate, Target, candidates, outside
from sarqc.model.lazy_model import LazyModel

GROUP_SIZES = (128, 64, 32)
MOST_LEFT = 0.01
"""Share of the blocks' weights that may stay unquantized without `ignore`."""


@dataclass(frozen=True)
class Targets:
    """What is quantized and what is not.

    selected: in the order of the model. ignored: (linear, the pattern that found it). untouched: every other matrix of
    the checkpoint that somebody could take for a Linear, ignored ones and routers and `lm_head` included. left: the
    reason for those of them that are in the blocks. modules: the model's own names of Linears that are not quantized,
    where the checkpoint calls them otherwise. included: the model's names of those outside the blocks that are
    quantized (`LazyModel.included`).
    """

    selected: tuple[Target, ...]
    ignored: tuple[tuple[str, str], ...]
    untouched: tuple[str, ...]
    left: tuple[tuple[str, str], ...] = ()
    modules: tuple[str, ...] = ()
    included: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the targeted layers, without ".weight"."""
        return tuple(target.linear for target in self.selected)

    @cached_property
    def _by_block(self) -> dict[int, list[Target]]:
        by_block: dict[int, list[Target]] = {}
        for target in self.selected:
            by_block.setdefault(target.block, []).append(target)
        return by_block

    def of_block(self, index: int) -> list[Target]:
        """Targets of one unit."""
        return self._by_block.get(index, [])

    @property
    def first_block(self) -> int:
        """The first unit that has targets."""
        return self.selected[0].block

    @property
    def unquantized(self) -> list[str]:
        """Names for a config's list of what is not quantized: the checkpoint's, and the model's where they differ.

        transformers looks for its own names there, vLLM and SGLang for the checkpoint's.
        """
        return list(dict.fromkeys((*self.untouched, *self.modules)))

    def record(self) -> dict[str, Any]:
        """For a report: how many are quantized, and what is not and why."""
        return {
            "quantized": len(self.selected),
            "weights": sum(target.elements for target in self.selected),
            "embeddings": [target.linear for target in self.selected if target.embedding],
            "ignored": dict(self.ignored),
            "untouched": list(self.untouched),
            "left": dict(self.left),
            "unquantized": self.unquantized,
        }


def targets(lazy: LazyModel, quant: QuantConfig) -> Targets:
    """The layers that `quant` takes; its group size is not looked at.

    Raises:
        ModelError: more than 1 % of the blocks' weights cannot be quantized, with the reason and the pattern that
            leaves them; or the model has no Linear, or its code writes to its weights.
        ArgumentError: a pattern is no regular expression or finds nothing, or `include` finds what cannot be quantized.
    """
    _check_constant(lazy)
    selected: list[Target] = []
    ignored: list[tuple[str, str]] = []
    ruled: list[tuple[str, str]] = []
    refused: list[Candidate] = []
    matched: set[str] = set()
    for candidate in (*candidates(lazy), *_included(lazy, quant)):
        target = candidate.target
        finders = _finders(quant.ignore, target.names)
        matched.update(finders)
        if finders:
            ignored.append((target.linear, finders[0]))
        elif candidate.rule is not None:
            ruled.append((target.linear, candidate.rule))
        elif candidate.refusal is not None:
            refused.append(candidate)
        else:
            selected.append(target)
    _check_share(refused, [target for target in selected if target.block < len(lazy.blocks)])
    left = ruled + [(one.target.linear, str(one.refusal)) for one in refused]
    untouched, modules = _others(lazy, selected, (name for name, _ in (*ignored, *left)))
    for pattern in quant.ignore:
        if pattern not in matched and not _finders((pattern,), (*untouched, *modules)):
            raise ArgumentError(
                f"ignore = {pattern!r} finds no Linear of the model; "
                f"names look like {next((target.linear for target in selected), '?')!r}"
            )
    if quant.embedding_bits is not None and not any(target.embedding for target in selected):
        raise ArgumentError(
            f"embedding_bits = {quant.embedding_bits} has no effect: include = {tuple(quant.include)} finds no "
            "embedding; leave it out, or include one, as 'embed_tokens'"
        )
    if not selected:
        raise ModelError(f"{type(lazy.model).__name__} has no Linear left to quantize in its blocks")
    selected, included = _numbered(lazy, selected)
    return Targets(tuple(selected), tuple(ignored), untouched, tuple(left), modules, included)


def _included(lazy: LazyModel, quant: QuantConfig) -> Iterator[Candidate]:
    """What `include` finds outside the blocks."""
    if not quant.include:
        return
    others = list(outside(lazy))
    found = {one: _finders(quant.include, one.target.names) for one in others}
    for one, finders in found.items():
        reason = one.rule or one.refusal
        if finders and reason is not None and is_wanted(quant, one.target.names):
            raise ArgumentError(
                f"include = {finders[0]!r} finds {one.target.linear}, which cannot be quantized: {reason}; leave it "
                "out of include"
            )
    for pattern in quant.include:
        if not any(pattern in finders for finders in found.values()):
            able = ", ".join(one.target.linear for one in others if one.rule is None and one.refusal is None)
            raise ArgumentError(
                f"include = {pattern!r} finds no Linear or embedding outside the decoder blocks, whose Linears are "
                f"quantized anyway; what can be included is {able or 'nothing in this model'}"
            )
    yield from (one for one, finders in found.items() if finders)


def _numbered(lazy: LazyModel, selected: Sequence[Target]) -> tuple[list[Target], tuple[str, ...]]:
    """The layers with those outside the blocks counted on from there, and what modules these are in."""
    count = len(lazy.blocks)
    included = tuple(dict.fromkeys(target.module for target in selected if target.block >= count))
    places = {name: count + number for number, name in enumerate(included)}
    return [replace(one, block=places.get(one.module, one.block)) for one in selected], included


def is_wanted(quant: QuantConfig, names: Iterable[str]) -> bool:
    """Whether no ignore pattern finds any of a layer's names."""
    return not _finders(quant.ignore, names)


def targets_of(lazy: LazyModel, linears: Iterable[str]) -> Targets:
    """The layers that a checkpoint has quantized, by its names; whatever else there is was left, for any reason."""
    wanted = set(linears)
    found = [one.target for one in candidates(lazy) if one.target.linear in wanted]
    if rest := wanted.difference(target.linear for target in found):
        found += [one.target for one in outside(lazy) if one.target.linear in rest]
    selected, included = _numbered(lazy, found)
    untouched, modules = _others(lazy, selected, ())
    return Targets(tuple(selected), (), untouched, (), modules, included)


def _check_constant(lazy: LazyModel) -> None:
    """`ModelError` where the model's own forward writes to a weight: it cannot write to a packed one."""
    changed = lazy.usage.changed if lazy.usage else ()
    if changed:
        raise ModelError(
            f"{type(lazy.model).__name__} changes {min(changed)} in its forward, which no runtime does to a quantized "
            "weight; such models are not quantized"
        )


def _check_share(refused: Sequence[Candidate], selected: Sequence[Target]) -> None:
    """`ModelError` where too much would stay unquantized without `ignore`."""
    lost = sum(one.target.elements for one in refused)
    share = lost / max(lost + sum(target.elements for target in selected), 1)
    if share <= MOST_LEFT:
        return
    first = max(refused, key=lambda one: one.target.elements)
    raise ModelError(
        f"{first.target.linear} cannot be quantized: {first.refusal}; it and its like are {share:.0%} of the weights: "
        f"leave them with --ignore '{pattern_of(one.target for one in refused)}'"
    )


def pattern_of(layers: Iterable[Target]) -> str:
    """A regular expression that finds these layers in every block, or behind the blocks."""
    split = [re.split(r"\.\d+\.", target.linear, maxsplit=1) for target in layers]
    stars = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", parts[-1]) for parts in split)
    escaped = [re.escape(star).replace(r"\*", r"\d+") for star in stars]
    start = r"\." if all(parts[1:] for parts in split) else r"(^|\.)"
    return rf"{start}({'|'.join(escaped)})$" if len(escaped) > 1 else rf"{start}{escaped[0]}$"


def auto_group_size(targets: Targets) -> int:
    """The largest of 128, 64, 32 that divides every targeted layer's inputs; `ArgumentError` naming a layer if none."""
    for group_size in GROUP_SIZES:
        if all(target.shape[1] % group_size == 0 for target in targets.selected):
            return group_size
    odd = [target for target in targets.selected if target.shape[1] % GROUP_SIZES[-1]]
    raise ArgumentError(
        f"group_size = 'auto' has no answer: {odd[0].linear} has {odd[0].shape[1]} inputs, which 32 does not divide; "
        f"use -1 (one scale per row), a size that fits, or leave such layers with --ignore '{pattern_of(odd)}'"
    )


def check_group_size(targets: Targets, quant: QuantConfig) -> None:
    """`ArgumentError`, with a layer and what would fit, where the group size does not divide some layer's inputs."""
    odd = [target for target in targets.selected if not quant.divides(target.shape[1])]
    if not odd:
        return
    fitting = [g for g in GROUP_SIZES if all(target.shape[1] % g == 0 for target in targets.selected)]
    advice = f"use {', '.join(map(str, fitting))} or -1" if fitting else "use -1 (one scale per row)"
    raise ArgumentError(
        f"group_size = {quant.group_size} does not divide the {odd[0].shape[1]} inputs of {odd[0].linear}: {advice}, "
        f"or leave such layers with --ignore '{pattern_of(odd)}'"
    )


def _others(
    lazy: LazyModel, selected: Sequence[Target], more: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Matrices that are not quantized by the checkpoint's names, and Linears among them by the model's other names.

    more: names that belong to the first, whatever they look like.
    """
    names, modules = {target.linear for target in selected}, {target.module for target in selected}
    untouched = dict.fromkeys(name for name in (*_matrices(lazy), *more) if name not in names)
    linears = (path for path, module in lazy.model.named_modules() if isinstance(module, nn.Linear))
    return tuple(untouched), tuple(path for path in linears if path not in modules and path not in untouched)


def _matrices(lazy: LazyModel) -> list[str]:
    """Names of all matrices of the checkpoint that are not embeddings, and of Linears that are tied to one; those that
    the model has no use for too: a server may have one."""
    names: dict[str, None] = {}
    for parameter, slices in lazy.slices.items():
        path, _, _ = parameter.rpartition(".")
        module = lazy.model.get_submodule(path)
        matrix = lazy.model.get_parameter_or_buffer(parameter).dim() == 2 or moe.is_experts(module)
        if matrix and not isinstance(module, nn.Embedding):
            names |= dict.fromkeys(stored.linear or stored.name for stored in slices)
    for path, module in lazy.model.named_modules():
        if isinstance(module, nn.Linear) and f"{path}.weight" not in lazy.slices:
            names[path] = None
    names |= dict.fromkeys(name for name in lazy.unused if "embed" not in name.rpartition(".")[2])
    return list(names)


def _finders(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The patterns, regular expressions, that find one of these names."""
    given = tuple(names)
    return [pattern for pattern in patterns if any(re.search(pattern, name) for name in given)]

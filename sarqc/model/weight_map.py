"""Which checkpoint tensor becomes which part of which parameter, learned from transformers itself.

A checkpoint's names are not the model's names: transformers renames tensors and stacks those of the experts into one
3-D parameter while it loads. It has the rules; this file has none. It sends small tagged tensors through the same
conversion and reads off where each of them lands. A tag is a 2 x 3 matrix of numbers that no other tensor has, so a
transposition, an interleaving or a missing expert cannot go unnoticed. What is made in any other way (a concatenated
convolution, a fused projection that is cut in three) is made by transformers' own conversion when it is loaded; such a
parameter is right, and is no candidate for quantization.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from sarqc.conventions import MatrixSlice
from sarqc.errors import ModelError, first_line
from sarqc.model import moe
from sarqc.model.expert_names import AllExperts, single_experts, stored_names
from sarqc.model.source import HeaderSource, TensorSource
from sarqc.model.transposed import become_linear, is_transposed

_TAG = torch.arange(6).view(2, 3)
_WEIGHT = ".weight"


@dataclass(frozen=True, eq=False)
class Conversion:
    """How transformers makes `parameter` of several tensors, or of one, other than by stacking matrices.

    rule: its converter, which is copied before it runs. first: the parameter that the rule is called for. names: the
    tensors in their order, each with the rule's pattern that found it.
    """

    rule: Any
    model: Any
    first: str
    parameter: str
    names: tuple[tuple[str, str], ...]

    def run(self, load: Callable[[str], Tensor]) -> Tensor:
        """The parameter, of tensors that `load` gives by their names."""
        value = _convert(self.rule, self.model, self.first, self.names, load)[self.parameter]
        tensor: Tensor = value[0] if isinstance(value, list) else value
        return tensor

    def of_experts(self) -> AllExperts | None:
        """The tensors of all experts in the order of the rows; None where the conversion makes it of others, or
        otherwise."""
        order = [name for wanted in self.rule.source_patterns for pattern, name in self.names if pattern == wanted]
        match self.rule.operations:
            case [Transpose(dim0=1, dim1=2)]:
                return AllExperts(tuple(order), flipped=True)
            case [Concatenate(dim=1)]:
                return AllExperts(tuple(order))
            case [Interleave(dim=1, inverse=False)]:
                return AllExperts(tuple(order), interleaved=True)
        return None

    def __str__(self) -> str:
        """Its operations, for a message."""
        return ", ".join(type(operation).__name__ for operation in self.rule.operations)


@dataclass(frozen=True)
class TensorSlice:
    """The checkpoint tensor `name` fills rows start .. start + rows of matrix `expert` of a parameter.

    expert None: it is the whole parameter, whatever its rank; or one of the tensors that `conversion` makes it of.
    """

    name: str
    expert: int | None
    start: int
    rows: int
    conversion: Conversion | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The view of a parameter that the tensor fills."""
        return parameter if self.expert is None else parameter[self.expert, self.start : self.start + self.rows]

    @property
    def is_whole(self) -> bool:
        """Whether the parameter is this tensor as it is stored."""
        return self.expert is None and self.conversion is None

    @property
    def linear(self) -> str | None:
        """The linear layer this is the weight of, as the checkpoint calls it; None for any other tensor."""
        whole = self.conversion is None and self.name.endswith(_WEIGHT)
        return self.name.removesuffix(_WEIGHT) if whole else None


def trace(model: Any, source: TensorSource) -> dict[str, tuple[TensorSlice, ...]]:
    """For every stored parameter and buffer of `model` (on meta), the checkpoint tensors that it is made of.

    Tied parameters that the checkpoint lacks are left out. Raises `ModelError`, naming the tensor, where the
    checkpoint lacks one, or has one of another shape.
    """
    wanted: dict[str, Tensor] = model.state_dict()
    whole, stacked = _sort_names(model, source, wanted)
    slices: dict[str, tuple[TensorSlice, ...]] = {p: (TensorSlice(name, None, 0, 0),) for p, name in whole.items()}
    for first, (converter, names) in stacked.items():
        slices |= _follow(model, first, converter, names, source)
    _turn_packed(model, source, whole)
    slices |= _one_by_one(model, source, [parameter for parameter in wanted if parameter not in slices])
    wanted = model.state_dict()
    for parameter, tensor in wanted.items():
        if parameter in slices:
            _check_shape(model, parameter, tensor, slices[parameter], source)
        elif tied_to(model, parameter) not in slices:
            present = set(source.names())
            missing = next((name for name in stored_names(model, parameter) if name not in present), parameter)
            longer = next((name for name in source.names() if name.endswith(f".{missing}")), None)
            hint = f"; it has {longer!r}: rename its tensors, transformers would not find them either" if longer else ""
            raise ModelError(f"the checkpoint lacks tensor {missing!r}, which {type(model).__name__} needs{hint}")
    return slices


def read_together(model: Any, source: TensorSource, wanted: Mapping[str, Tensor]) -> list[frozenset[str]]:
    """The checkpoint tensors of each conversion: transformers makes its parameters of all of them or not at all.

    wanted: `model.state_dict()` of the model as transformers built it.
    """
    _, stacked = _sort_names(model, source, wanted)
    return [frozenset(name for group in names.values() for name in group) for _, names in stacked.values()]


def _turn_packed(model: Any, source: TensorSource, whole: Mapping[str, str]) -> None:
    """Let modules that multiply from the other side become Linears where the checkpoint has them packed, as we do."""
    for parameter, name in whole.items():
        path, _, leaf = parameter.rpartition(".")
        turned = leaf == "weight" and is_transposed(model.get_submodule(path))
        if turned and source.quantized(name.removesuffix(_WEIGHT)) is not None:  # a square shape would not say so
            become_linear(model, path)


def _one_by_one(model: Any, source: TensorSource, lacking: Iterable[str]) -> dict[str, tuple[TensorSlice, ...]]:
    """Experts that the checkpoint has one by one where transformers reads them all in one tensor: as we write them."""
    present, slices = set(source.names()), {}
    for parameter in lacking:
        module = model.get_submodule(parameter.rpartition(".")[0])
        if not moe.is_experts(module) or parameter.rpartition(".")[2] not in moe.projections(module):
            continue
        single = single_experts(model, parameter, AllExperts(tuple(stored_names(model, parameter))))
        if single and single.keys() <= present:
            slices[parameter] = slices_of(single)
    for path in dict.fromkeys(parameter.rpartition(".")[0] for parameter in slices):
        moe.separate_projections(model.get_submodule(path))
    return slices


def slices_of(single: Mapping[str, MatrixSlice]) -> tuple[TensorSlice, ...]:
    """Slices of an experts module's parameter whose matrices are read one by one."""
    return tuple(TensorSlice(name, part.expert, part.row, part.shape[0]) for name, part in single.items())


def tensors_of_experts(slices: Sequence[TensorSlice]) -> AllExperts | None:
    """The tensors of all experts that a parameter is made of; None for others."""
    if len(slices) == 1 and slices[0].is_whole:
        return AllExperts((slices[0].name,))
    made = slices[0].conversion
    return None if made is None else made.of_experts()


def own_names(model: Any, parameter: str) -> tuple[TensorSlice, ...] | None:
    """Pieces under which transformers reads the experts of a parameter one by one; None where it does not."""
    stored = stored_names(model, parameter)
    source = HeaderSource.of(stored)
    whole, stacked = _sort_names(model, source, {parameter: model.get_parameter(parameter)})
    if whole or len(stored) == 1:
        return None
    pieces: dict[str, tuple[TensorSlice, ...]] = {}
    for first, (converter, names) in stacked.items():
        pieces |= _follow(model, first, converter, names, source)
    slices = pieces.get(parameter, ())
    return slices if slices and all(stored.expert is not None and stored.linear for stored in slices) else None


def alone(model: Any, parameter: str, names: Iterable[str]) -> str | None:
    """The first of these names that transformers reads, if it stands alone, as the whole parameter."""
    like = model.get_parameter(parameter).to("meta")
    for name in names:
        if _sort_names(model, HeaderSource.of({name: like}), {parameter: like})[0] == {parameter: name}:
            return name
    return None


Named = dict[str, list[str]]


def _sort_names(
    model: Any, source: TensorSource, wanted: Mapping[str, Tensor]
) -> tuple[dict[str, str], dict[str, tuple[Any, Named]]]:
    """Names that fill a parameter alone; and for the first parameter of each conversion, its names by pattern."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    whole: dict[str, str] = {}
    stacked: dict[str, tuple[Any, Named]] = {}
    for name in sorted(source.names(), key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if parameter not in wanted and name in wanted:
            parameter, pattern = rename_source_key(name, [], [], prefix, wanted)
        if parameter not in wanted:
            continue  # tensors that this model has no use for, as transformers ignores them too
        if pattern is None:
            whole.setdefault(parameter, name)
        else:
            _, names = stacked.setdefault(parameter, (by_pattern[pattern], {}))
            names.setdefault(pattern, []).append(name)
    return whole, stacked


def _follow(
    model: Any, first: str, converter: Any, names: Named, source: TensorSource
) -> dict[str, tuple[TensorSlice, ...]]:
    """Send tags through one conversion, and where they do not come out, shapes; the parameters with their slices."""
    order = tuple((pattern, name) for pattern, group in names.items() for name in group)
    number = {name: at for at, (_, name) in enumerate(order)}
    match converter.operations:  # such a rule leaves what has the parameter's shape already
        case [Transpose(check_dims=True)] if source.shape(order[0][1]) == tuple(model.get_parameter(first).shape):
            return {first: (TensorSlice(order[0][1], None, 0, 0),)}
    tags: dict[str, Any] = {}
    with suppress(Exception):  # an operation that cannot take a 2 x 3 matrix fails in its own way
        tags = _convert(converter, model, first, order, lambda name: _TAG + _TAG.numel() * number[name])
    landed = {
        parameter: _read_tags(value[0] if isinstance(value, list) else value, [name for _, name in order], source)
        for parameter, value in tags.items()
    }
    if sorted(stored.name for slices in landed.values() for stored in slices or ()) == sorted(number):
        return {parameter: slices for parameter, slices in landed.items() if slices}
    try:
        shapes = _convert(converter, model, first, order, lambda name: torch.empty(source.shape(name), device="meta"))
    except Exception as error:  # so does one that is given tensors that do not go together
        lost = [name for name in stored_names(model, first) if name not in number]
        what = f"lacks tensor {lost[0]!r}" if lost else f"has {_outlier(names, source)}: {first_line(error)}"
        raise ModelError(f"the checkpoint {what}; {first!r} is made of {len(order)} tensors") from error
    return {parameter: _made(Conversion(converter, model, first, parameter, order)) for parameter in shapes}


def _outlier(names: Named, source: TensorSource) -> str:
    """The first tensor whose shape differs from that of most others under its pattern."""
    for group in names.values():
        shapes = [tuple(source.shape(name)) for name in group]
        usual = max(shapes, key=shapes.count)
        for name, shape in zip(group, shapes):
            if shape != usual:
                return f"{name!r} in shape {list(shape)}, others like it in {list(usual)}"
    return "tensors that do not combine"


def _made(conversion: Conversion) -> tuple[TensorSlice, ...]:
    return tuple(TensorSlice(name, None, 0, 0, conversion) for _, name in conversion.names)


def _convert(
    rule: Any, model: Any, first: str, names: Iterable[tuple[str, str]], load: Callable[[str], Tensor]
) -> dict[str, Any]:
    """Run a copy of a converter over tensors that `load` gives."""
    rule = copy.deepcopy(rule)
    for pattern, name in names:
        rule.add_tensor(first, name, pattern, load(name))
    made: dict[str, Any] = rule.convert(first, model=model, config=model.config)
    return made


def _read_tags(tags: Tensor, order: list[str], source: TensorSource) -> tuple[TensorSlice, ...] | None:
    """Pieces behind a stack [E, parts * 2, 3] of tags, or a matrix of several; None where it is anything else."""
    if tags.dim() == 2 and len(tags) > _TAG.shape[0]:
        tags = tags[None]
    if tags.dim() != 3 or tags.shape[1] % _TAG.shape[0] or tags.shape[2] != _TAG.shape[1]:
        return None
    blocks = tags.reshape(len(tags), -1, *_TAG.shape)
    which = blocks[:, :, 0, 0] // _TAG.numel()
    intact = torch.equal(blocks, which[:, :, None, None] * _TAG.numel() + _TAG)
    if not intact or which.flatten().unique().numel() != which.numel():
        return None
    if any(len(source.shape(name)) != 2 for name in order):
        return None
    slices = []
    for expert, parts in enumerate(which.tolist()):
        start = 0
        for part in parts:
            rows = source.shape(order[part])[0]
            slices.append(TensorSlice(order[part], expert, start, rows))
            start += rows
    return tuple(slices)


def _check_shape(
    model: Any, parameter: str, tensor: Tensor, slices: tuple[TensorSlice, ...], source: TensorSource
) -> None:
    """Whether the slices fill the parameter exactly."""
    wanted = tuple(tensor.shape)
    if (made := slices[0].conversion) is not None:
        shape = tuple(made.run(lambda name: torch.empty(source.shape(name), device="meta")).shape)
        if shape != wanted:
            raise ModelError(
                f"{parameter!r} is made from {slices[0].name!r} by {made} and becomes {list(shape)}; the configuration "
                f"asks for {list(wanted)}"
            )
        return
    if slices[0].expert is None:
        shape = tuple(source.shape(slices[0].name))
        if shape != wanted:
            raise ModelError(f"tensor {slices[0].name!r} is {list(shape)}; the configuration asks for {list(wanted)}")
        return
    experts, rows, columns = wanted if len(wanted) == 3 else (1, *wanted)
    parts = max(len(slices) // experts, 1)
    for stored in slices:
        shape = tuple(source.shape(stored.name))
        if shape[1] != columns or (len(slices) == parts * experts and stored.rows * parts != rows):
            raise ModelError(f"tensor {stored.name!r} is {list(shape)}; {parts} of it do not make {[rows, columns]}")
    if len(slices) != parts * experts:
        lost = [name for name in stored_names(model, parameter) if name not in {p.name for p in slices}]
        what = f"lacks tensor {lost[0]!r}" if lost else f"has {len(slices)} tensors for it"
        raise ModelError(f"parameter {parameter!r} holds {experts} matrices, and the checkpoint {what}")


def tied_to(model: Any, parameter: str) -> str | None:
    """The parameter that transformers ties this one to, in either direction; None where it stands alone."""
    pairs: dict[str, str] = model.all_tied_weights_keys
    return pairs.get(parameter) or next((tied for tied, origin in pairs.items() if origin == parameter), None)

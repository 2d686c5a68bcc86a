"""Matrices that a checkpoint stores in another form than that of a Linear: they are written as one each.

- Rows of one tensor that transformers cuts into several Linears (fused q, k and v). Each gets a name under which
  transformers reads it alone.
- Matrices of inputs x outputs, see `transposed`. A Linear takes the module's place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sarqc.conventions import MatrixSlice
from sarqc.model.transposed import become_linear, is_transposed
from sarqc.model.weight_map import Conversion, TensorSlice, alone

Wanted = Callable[[Iterable[str]], bool]
"""Whether the layer of these names is to be quantized."""
Slices = Mapping[str, tuple[TensorSlice, ...]]


def cut(model: Any, linears: Iterable[str], slices: Slices, wanted: Wanted) -> dict[str, tuple[str, MatrixSlice]]:
    """For each Linear's weight that is some rows of a tensor, its new name, and where it lies.

    linears: parameters that may be. A tensor stays whole where none of its Linears is wanted, or one of its parameters
    is not among them.
    """
    made: dict[str, dict[str, Conversion]] = {}
    for parameter, stored in slices.items():
        if (conversion := stored[0].conversion) is not None and len(stored) == 1:
            made.setdefault(stored[0].name, {})[parameter] = conversion
    matrices: dict[str, tuple[str, MatrixSlice]] = {}
    for tensor, conversions in made.items():
        pieces = _pieces(model, tensor, conversions) if conversions.keys() <= set(linears) else {}
        if any(wanted((name.removesuffix(".weight"), parameter)) for parameter, (name, _) in pieces.items()):
            matrices |= pieces
    return matrices


def _pieces(model: Any, tensor: str, conversions: Mapping[str, Conversion]) -> dict[str, tuple[str, MatrixSlice]]:
    shapes = {parameter: model.get_parameter(parameter).shape for parameter in conversions}
    taken = torch.zeros(sum(shape[0] for shape in shapes.values()), dtype=torch.int64)
    rows = torch.arange(len(taken))[:, None]
    matrices: dict[str, tuple[str, MatrixSlice]] = {}
    for parameter, conversion in conversions.items():
        here = conversion.run(lambda name: rows.clone()).flatten()
        name = alone(model, parameter, _names(tensor, parameter))
        step = int(here[1] - here[0]) if len(here) > 1 else 1
        if name is None or step < 1 or not torch.equal(here, torch.arange(len(here)) * step + here[0]):
            return {}
        taken[here] += 1
        matrices[parameter] = name, MatrixSlice(tensor, None, int(here[0]), step, tuple(shapes[parameter]), False, 0)
    return matrices if taken.eq(1).all() else {}


def _names(tensor: str, parameter: str) -> tuple[str, str]:
    """Names that a piece may have: one beside the tensor's, or what the model calls it."""
    leaf = ".".join(parameter.rsplit(".", 2)[1:])
    return f"{tensor.rsplit('.', 2)[0]}.{leaf}", parameter


def turn(model: Any, inside: str, slices: Slices, wanted: Wanted) -> dict[str, MatrixSlice]:
    """The matrices of modules below `inside` that multiply from the other side, which become Linears."""
    matrices: dict[str, MatrixSlice] = {}
    for path, module in list(model.named_modules()):
        stored = slices.get(f"{path}.weight", ())
        if not path.startswith(inside) or isinstance(module, nn.Linear) or not stored or stored[0].linear is None:
            continue
        if wanted((stored[0].linear, path)) and is_transposed(module):
            inputs, outputs = module.weight.shape
            matrices[stored[0].name] = MatrixSlice(stored[0].name, None, 0, 1, (outputs, inputs), True, 0)
            become_linear(model, path)
    return matrices

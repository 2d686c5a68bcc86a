"""Modules that multiply from the other side than a Linear does, as GPT-2's `Conv1D`: told by trying, not by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_transposed(module: nn.Module) -> bool:
    """Whether a module multiplies its input by `weight` [inputs, outputs] as it is and adds its bias, if any."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    names = {name for name, there in module._parameters.items() if there is not None}
    if (
        isinstance(module, nn.Linear | nn.Embedding)
        or weight is None
        or weight.dim() != 2
        or not names <= {"weight", "bias"}
    ):
        return False
    if bias is not None and bias.shape != weight.shape[1:]:
        return False
    inputs, outputs = weight.shape
    small = {outputs: 4, inputs: 6}
    return computes(module, (2, 3, 6), lambda x, w, b: x @ w if b is None else x @ w + b, small)


def become_linear(model: Any, path: str) -> None:
    """Put a Linear on meta in the place of a module that `is_transposed`."""
    parent, _, leaf = path.rpartition(".")
    there = model.get_submodule(path)
    inputs, outputs = there.weight.shape
    made = nn.Linear(inputs, outputs, bias=there.bias is not None, device="meta", dtype=there.weight.dtype)
    model.get_submodule(parent)._modules[leaf] = made.train(there.training)


@torch.no_grad()
def computes(
    module: nn.Module, shape: tuple[int, ...], wanted: Callable[..., Tensor], sizes: Mapping[int, int] | None = None
) -> bool:
    """Whether a module's own forward gives wanted(x, weight, bias) on random numbers x of this shape.

    sizes: what to try in the place of the module's own sizes, also where it remembers them.
    """
    sizes = sizes or {}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    parameters = {
        name: None if there is None else nn.Parameter(_randn(there.shape, sizes, generator))
        for name, there in module._parameters.items()
    }
    tried = object.__new__(type(module))
    remembered = {name: sizes.get(value, value) for name, value in vars(module).items() if type(value) is int}
    tried.__dict__ = vars(module) | remembered | {"_parameters": parameters}
    try:
        actual = tried(x)
    except Exception:  # noqa: BLE001  # a forward that takes something else does something else
        return False
    made = wanted(x, parameters["weight"], parameters.get("bias"))
    return isinstance(actual, Tensor) and actual.shape == made.shape and torch.allclose(actual, made, 1e-3, 1e-3)


def _randn(shape: Iterable[int], sizes: Mapping[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn([sizes.get(size, size) for size in shape], generator=generator)

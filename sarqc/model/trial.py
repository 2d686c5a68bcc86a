"""Trying a module on numbers: what it computes is found by its own forward, not by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def small_copy(module: nn.Module, sizes: Mapping[int, int], generator: torch.Generator) -> Any:
    """A copy with random parameters that are its own; its submodules are those of the module.

    sizes: what to take in the place of a size of the module, also where it remembers one.
    """
    copy = object.__new__(type(module))
    remembered = {name: sizes.get(value, value) for name, value in vars(module).items() if type(value) is int}
    parameters = {
        name: None
        if there is None
        else nn.Parameter(torch.randn([sizes.get(size, size) for size in there.shape], generator=generator))
        for name, there in module._parameters.items()
    }
    copy.__dict__ = vars(module) | remembered | {"_parameters": parameters}
    return copy


@torch.no_grad()
def computes(
    module: nn.Module, shape: tuple[int, ...], wanted: Callable[..., Tensor], sizes: Mapping[int, int] | None = None
) -> bool:
    """Whether a module's own forward gives wanted(x, weight, bias) on random numbers x of this shape.

    sizes: as of `small_copy`.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    tried = small_copy(module, sizes or {}, generator)
    try:
        actual = tried(x)
    except Exception:  # noqa: BLE001  # a forward that takes something else does something else
        return False
    made = wanted(x, tried._parameters["weight"], tried._parameters.get("bias"))
    return isinstance(actual, Tensor) and actual.shape == made.shape and torch.allclose(actual, made, 1e-3, 1e-3)

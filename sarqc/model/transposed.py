"""Modules that multiply from the other side than a Linear does, as GPT-2's `Conv1D`: found by trying, not by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from sarqc.model.trial import computes


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

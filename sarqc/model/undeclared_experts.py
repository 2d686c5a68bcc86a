"""Experts that transformers calls through no experts function, as its older classes do: run by ours all the same.

Such a module has the two 3-D parameters of all others and code of its own around them. What the code does is tried on
numbers: a copy with small random matrices has to give what our function gives. Any other module stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from sarqc.model import moe
from sarqc.model.trial import small_copy

_PARAMETERS = ("gate_up_proj", "down_proj")
Run = Callable[..., Tensor]
_EXPERTS, _TOKENS, _CHOICES = 3, 5, 2


def adopt(model: Any) -> None:
    """Let every undeclared experts module of this model run our functions, and say what the declared ones say."""
    seen: dict[Any, tuple[Run, bool] | None] = {}
    for module in model.modules():
        if moe.is_experts(module) or tuple(name for name, _ in module.named_parameters(recurse=False)) != _PARAMETERS:
            continue
        kind = (type(module), *(tuple(getattr(module, name).shape) for name in _PARAMETERS))
        if kind not in seen:
            tries = ((run, how) for run, how in product(_INPUTS, (False, True)) if _matches(module, run, how))
            seen[kind] = next(tries, None)
        if (declaration := seen[kind]) is not None:
            _declare(module, *declaration)


def _declare(module: Any, run: Run, transposed: bool) -> None:
    module.num_experts = len(module.down_proj)
    module.has_gate, module.has_bias, module.is_transposed = True, False, transposed
    if not hasattr(module, "_apply_gate"):
        module._apply_gate = partial(_default_apply_gate, module)
    module.forward = partial(run, module)


@torch.no_grad()
def _matches(module: nn.Module, run: Run, transposed: bool) -> bool:
    """Whether a small copy of the module, with its own code, gives what `run` gives."""
    own, ours = _small_copy(module, transposed), _small_copy(module, transposed)
    if own is None or ours is None:
        return False
    _declare(ours, run, transposed)
    inputs = _INPUTS[run](own.down_proj.shape[2 if transposed else 1])
    try:
        actual, wanted = own(*inputs), ours(*inputs)
    except Exception:  # noqa: BLE001  # code that takes something else fails with whatever it happens to raise
        return False
    return isinstance(actual, Tensor) and actual.shape == wanted.shape and torch.allclose(actual, wanted, 1e-4, 1e-4)


def _small_copy(module: Any, transposed: bool) -> Any:
    """A copy with small random matrices, and with small numbers where the module remembers their sizes; None where the
    shapes are not those of gated experts."""
    experts, hidden, inner = module.down_proj.mT.shape if transposed else module.down_proj.shape
    wanted = (experts, hidden, 2 * inner) if transposed else (experts, 2 * inner, hidden)
    if module.down_proj.dim() != 3 or tuple(module.gate_up_proj.shape) != wanted:
        return None
    sizes = {experts: _EXPERTS, inner: 4, 2 * inner: 8}
    sizes.setdefault(hidden, 6)
    return small_copy(module, sizes, torch.Generator().manual_seed(0))


def _random_routing(hidden: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(_TOKENS, _EXPERTS, generator=generator)
    weights, chosen = scores.topk(_CHOICES)
    return torch.randn(_TOKENS, hidden, generator=generator), chosen, weights


def _random_expert_inputs(hidden: int) -> tuple[Tensor, ...]:
    x = torch.randn(_EXPERTS * _TOKENS, hidden, generator=torch.Generator().manual_seed(1))
    x[::2] = 0
    return (x,)


_INPUTS: dict[Run, Callable[[int], tuple[Tensor, ...]]] = {
    moe.sorted_experts: _random_routing,
    moe.all_experts: _random_expert_inputs,
}

"""Mixture of experts: the only file that knows the word.

transformers stores the experts of a layer as two 3-D parameters and calls them through a registered function. Ours
sorts the tokens by expert once and then works on ragged rows (x sorted by expert, offsets [E + 1]): the same form
the kernels take. It tells whoever observes the module what goes into each of its two projections, and where a
projection is a packed module instead of a parameter it calls that; nothing else changes between calibration and
inference. Where both are packed and the gate is the common one (SiLU), the whole layer is one operation of
`sarqc_kernels`.

Of dense experts the result is eager's, bit for bit: rows stand in eager's order within an expert, and each token adds
up its experts in eager's order, which is ascending. Packed ones round less: they are added up in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from sarqc.model.packed_linear import PackedWeight
from sarqc_kernels import w4a16

Observer = Callable[[str, Tensor, Tensor], None]
"""Called as observer(projection, x [T, K] sorted by expert, offsets int64 [E + 1]) before each projection; rows are
scaled if `observed` requests it."""

IMPLEMENTATION = "sarqc"
_OBSERVER = "_sarqc_observer"
_INTERLEAVED = "_sarqc_interleaved"
_DECLARED = ("has_gate", "has_bias", "is_transposed", "num_experts", "down_proj")


@dataclass(frozen=True)
class Routing:
    """Where tokens go. offsets: int64 [E + 1]. tokens, choices: int64 [T * k], row and column of `top_k_index` behind
    each sorted row. slots: int64 [k, T], the sorted rows of each token, experts ascending."""

    offsets: Tensor
    tokens: Tensor
    choices: Tensor
    slots: Tensor


def route(top_k_index: Tensor, num_experts: int) -> Routing:
    """Sort the choices [T, k] of all tokens by expert; no host synchronisation."""
    count, top_k = top_k_index.shape
    chosen, order = torch.sort(top_k_index.t().reshape(-1), stable=True)
    experts = torch.arange(num_experts + 1, device=chosen.device, dtype=chosen.dtype)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(order.numel(), device=order.device)
    return Routing(
        offsets=torch.searchsorted(chosen, experts),
        tokens=order % count,
        choices=order // count,
        slots=rows.view(top_k, count).sort(0).values,
    )


def sorted_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of one layer on hidden_states [T, H], as transformers calls them; see the file's first lines."""
    if is_fused(module):
        rows = w4a16.route(top_k_index, top_k_weights, module.num_experts)
        gate_up, down = (getattr(module, name).prepared() for name in projections(module))
        return w4a16.w4a16_experts(hidden_states, gate_up, down, rows)
    routing = route(top_k_index, module.num_experts)
    x = hidden_states[routing.tokens]
    weights = top_k_weights[routing.tokens, routing.choices]
    y = (_through(module, x, routing.offsets, weights) * weights[:, None]).to(hidden_states.dtype)
    out = torch.zeros_like(hidden_states)
    for rows in routing.slots:
        out = out + y[rows]
    return out


def all_experts(module: Any, hidden_states: Tensor) -> Tensor:
    """Experts that are called with the tokens of each one after the other, [E * T, H], and weigh nothing.

    Rows of zeros are tokens of other experts. They come out as zeros, and are not reported.
    """
    kept = hidden_states.any(-1)
    offsets = nn.functional.pad(kept.view(module.num_experts, -1).sum(1).cumsum(0), (1, 0))
    x = hidden_states[kept]
    out = torch.zeros_like(hidden_states)
    out[kept] = _through(module, x, offsets, x.new_ones(len(x))).to(hidden_states.dtype)
    return out


def _through(module: Any, x: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Rows x [T, H], sorted by expert, through both projections; weights [T] are for the observer only."""
    first, second = projections(module)
    _report(module, first, x, offsets, weights)
    y = _project(module, first, x, offsets)
    if getattr(module, _INTERLEAVED, False):
        y = y.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)  # as the module's own gate expects them
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    _report(module, second, y, offsets, weights)
    y = _project(module, second, y, offsets)
    return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y


def is_fused(module: Any) -> bool:
    """Whether the layer is what `w4a16_experts` computes: packed, unobserved, gated by SiLU, nothing in between."""
    return (
        all(isinstance(getattr(module, name), PackedWeight) for name in projections(module))
        and getattr(module, _OBSERVER, None) is None
        and module.has_gate
        and getattr(module, "is_concatenated", True)
        and getattr(type(module), "_apply_gate", None) is _default_apply_gate
        and isinstance(module.act_fn, (nn.SiLU, SiLUActivation))
        and not getattr(module, "has_post_expert_norm", False)
        and not module.has_bias
    )


def projections(module: Any) -> tuple[str, str]:
    """Names of the two projections of an experts module."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def is_experts(module: Any) -> bool:
    """Whether transformers calls this module through a registered experts function."""
    return all(hasattr(module, name) for name in _DECLARED) and hasattr(module, projections(module)[0])


def separate_projections(module: Any) -> None:
    """Let an experts module on meta hold its matrices as [experts, outputs, inputs], with gate rows before up rows.

    That is how they lie where each has a name of its own; `sorted_experts` computes the same with them. Biases stay as
    they are stored.
    """
    for projection in projections(module) if module.is_transposed else ():
        weight = getattr(module, projection)
        setattr(module, projection, nn.Parameter(torch.empty_like(weight.mT, device="meta"), requires_grad=False))
    module.is_transposed = False
    if module.has_gate and not getattr(module, "is_concatenated", True):
        module.is_concatenated = True
        setattr(module, _INTERLEAVED, True)


def use_sorted_experts(model: Any) -> None:
    """Let every experts module of this model run `sorted_experts`."""
    if any(is_experts(module) and "forward" not in vars(module) for module in model.modules()):
        model.set_experts_implementation(IMPLEMENTATION)


@contextmanager
def observed(module: nn.Module, observer: Observer, power: int = 0) -> Iterator[None]:
    """Report what enters the projections of one experts module to `observer`, and to no other one, for the time of the
    context.

    power: p, of the router weight w by which a row counts. Rows are reported times |w|^(p/2), so that
    sums of their squares and products, as a Gram is, weigh each by |w|^p. The output of the layer is sum_e w_e y_e:
    with p = 2 what is least squares for each expert is so for the layer, as far as its experts err independently.
    """
    before = getattr(module, _OBSERVER, None)
    setattr(module, _OBSERVER, (observer, power))
    try:
        yield
    finally:
        if before is None:
            delattr(module, _OBSERVER)
        else:
            setattr(module, _OBSERVER, before)


def unsupported_reason(module: Any, per_expert_names: bool) -> str | None:
    """Why the projections of an experts module cannot be quantized, or None.

    per_expert_names: whether the checkpoint stores one tensor per expert and projection.
    """
    reasons: list[str] = []
    if module.is_transposed:
        reasons.append("they are stored transposed (inputs x outputs)")
    if module.has_gate and not getattr(module, "is_concatenated", True):
        reasons.append("gate and up rows are interleaved")
    if not per_expert_names:
        reasons.append(
            "the checkpoint stores all experts in one tensor, so single ones have no name to be written under"
        )
    return ", ".join(reasons) or None


def matrices(module: Any) -> int:
    """How many experts a module holds."""
    return int(module.num_experts)


def _report(module: Any, projection: str, x: Tensor, offsets: Tensor, weights: Tensor) -> None:
    watching: tuple[Observer, int] | None = getattr(module, _OBSERVER, None)
    if watching is None:
        return
    observer, power = watching
    if power:
        x = (x.float() * weights.float().abs().pow(power / 2)[:, None]).to(x.dtype)
    observer(projection, x, offsets)


def _bias(module: Any, projection: str) -> Tensor:
    """Biases [E, N] in the order of the weight's rows."""
    bias: Tensor = getattr(module, f"{projection}_bias")
    if getattr(module, _INTERLEAVED, False) and projection == projections(module)[0]:
        bias = bias.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return bias


def _project(module: Any, projection: str, x: Tensor, offsets: Tensor) -> Tensor:
    """x [T, K] sorted by expert through each expert's own matrix -> [T, N]."""
    weight = getattr(module, projection)
    bias = _bias(module, projection) if module.has_bias else None
    if isinstance(weight, nn.Module):  # packed weights, see packed_linear.py
        packed: Tensor = weight(x, offsets)
        if bias is not None:
            rows = torch.arange(len(x), device=x.device, dtype=offsets.dtype)
            packed = packed + bias[torch.searchsorted(offsets[1:], rows, right=True)].to(packed.dtype)
        return packed
    out = x.new_empty(len(x), weight.shape[2 if module.is_transposed else 1])
    if x.is_meta:  # without data nobody knows who goes where: all rows go to one expert
        return nn.functional.linear(x, weight[0].t() if module.is_transposed else weight[0])
    bounds = offsets.tolist()  # the one synchronisation of the dense path
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            continue
        matrix = weight[expert].t() if module.is_transposed else weight[expert]
        out[start:stop] = nn.functional.linear(x[start:stop], matrix, None if bias is None else bias[expert])
    return out


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, sorted_experts)

"""The experts of a layer on packed weights: two products, a gate between them, and each token's sum of its experts.

    y_t = sum over e in top-k(t) of  r_te * W2_e (silu(G_e x_t) * U_e x_t),    W1_e = [G_e; U_e]

Tokens are not copied into the order of their experts: a `Routing` says which token stands behind each row. On a GPU it
is three launches (with Triton a fourth and a fifth where inputs are split): the gated first product, which reads x by
index and never writes gate or up; the second product; and the sum, which multiplies by the router's weights on its
way. Few rows are multiplied by csrc/gemv.cu, more of them by Triton. Elsewhere the same steps run one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from sarqc_kernels.backend import Implementation, pick, takes_all
from sarqc_kernels.checks import check_offsets, check_same_device
from sarqc_kernels.errors import ArgumentError
from sarqc_kernels.fast_path import takes_fast_path
from sarqc_kernels.w4a16 import cpu, cuda, matmul, reference
from sarqc_kernels.w4a16.layout import RepackedWeight, check_weight
from sarqc_kernels.w4a16.routing import Routing

__all__ = ["implementations", "w4a16_experts"]


_Product = Callable[[Tensor, RepackedWeight, Tensor | None, Tensor | None], Tensor]


def _step_by_step(
    product: _Product, x: Tensor, gate_up: RepackedWeight, down: RepackedWeight, routing: Routing
) -> Tensor:
    gate, up = product(x[routing.tokens], gate_up, routing.offsets, None).float().chunk(2, -1)
    rows = product((silu(gate) * up).to(x.dtype), down, routing.offsets, None)
    weighted = rows.float() * routing.weights.float().unsqueeze(-1)
    out = weighted.new_zeros((x.shape[0], down.out_features))
    for slot in routing.slots:
        out += weighted[slot]
    return out.to(x.dtype)


def _cpu_unsupported(x: Tensor, gate_up: RepackedWeight, down: RepackedWeight, routing: Routing) -> str | None:
    reasons = (cpu.unsupported(x, weight, routing.offsets, None) for weight in (gate_up, down))
    return next((reason for reason in reasons if reason), None)


def _triton_unsupported(x: Tensor, gate_up: RepackedWeight, down: RepackedWeight, routing: Routing) -> str | None:
    reasons = (matmul.triton_unsupported_product(x, weight, routing.offsets, None) for weight in (gate_up, down))
    return next((reason for reason in reasons if reason), None)


def _run_triton(x: Tensor, gate_up: RepackedWeight, down: RepackedWeight, routing: Routing) -> Tensor:
    from sarqc_kernels.w4a16.triton import experts as launcher

    return launcher.w4a16_experts(x, gate_up, down, routing)


_REFERENCE = Implementation("reference", takes_all, partial(_step_by_step, reference.w4a16_matmul))
_CPU = Implementation("cpu", _cpu_unsupported, partial(_step_by_step, cpu.w4a16_matmul))
_CUDA = Implementation("cuda", cuda.unsupported_experts, cuda.w4a16_experts)
_TRITON = Implementation("triton", _triton_unsupported, _run_triton)


def implementations(x: Tensor) -> Sequence[Implementation]:
    """What can run where `x` lies, in the order in which to try; as for `w4a16_matmul`."""
    return (_CPU, _REFERENCE, _TRITON, _CUDA) if x.is_cpu else (_CUDA, _TRITON, _CPU, _REFERENCE)


def w4a16_experts(
    x: Tensor, gate_up: RepackedWeight, down: RepackedWeight, routing: Routing, *, backend: str | None = None
) -> Tensor:
    """The experts of a layer, for every token.

    Rounding: products as in `w4a16_matmul`. Gate, up and the rows of the second product are rounded to x's dtype or
    kept in fp32. silu(gate) * up is computed in fp32 and rounded once. The sum over a token's experts is fp32, in the
    order of `slots`, rounded once. The same call gives the same bits. No gradient is defined.

    Args:
        x: bf16, fp16 or fp32 [T, H].
        gate_up: Repacked weight [E, 2 I, H], gate rows first.
        down: Repacked weight [E, H', I].
        routing: See `Routing`; its values are not checked.
        backend: See `sarqc_kernels.backend`.

    Returns:
        [T, H'] in x's dtype.

    Raises:
        ArgumentError: Shapes, dtypes or devices that do not fit.
    """
    experts = gate_up.words.shape[0]
    if x.dim() != 2 or x.dtype not in matmul.ACTIVATION_DTYPES or x.shape[1] != gate_up.in_features:
        raise ArgumentError(f"x is {x.dtype} {list(x.shape)}: pass bf16, fp16 or fp32 [tokens, {gate_up.in_features}]")
    if gate_up.out_features != 2 * down.in_features or down.words.shape[0] != experts:
        raise ArgumentError(
            f"gate_up is [{experts}, {gate_up.out_features}, {gate_up.in_features}] and down [{down.words.shape[0]}, "
            f"{down.out_features}, {down.in_features}]: pass [E, 2 I, H] and [E, H', I]"
        )
    check_weight("gate_up", gate_up)
    check_weight("down", down)
    offsets, tokens, slots, weights = routing
    check_offsets(offsets, experts)
    sizes = (tokens.numel(), weights.numel())
    if slots.dim() != 2 or slots.shape[1] != x.shape[0] or sizes != (slots.numel(), slots.numel()):
        raise ArgumentError(
            f"routing has tokens {list(tokens.shape)}, slots {list(slots.shape)} and weights {list(weights.shape)} for "
            f"{x.shape[0]} tokens: pass [T k], [k, T] and [T k]"
        )
    check_same_device(
        x=x, gate_up=gate_up.words, down=down.words, offsets=offsets, tokens=tokens, slots=slots, weights=weights
    )
    if takes_fast_path(x):
        return _dispatched((x, gate_up, down, routing), backend)
    out: Tensor = _OP(x, *gate_up, *down, *routing, backend)
    return out


def _dispatched(args: tuple[Tensor, RepackedWeight, RepackedWeight, Routing], backend: str | None) -> Tensor:
    out: Tensor = pick("w4a16_experts", implementations(args[0]), args, backend).run(*args)
    return out


_WEIGHT = (
    "Tensor {0}_words, Tensor {0}_scales, Tensor? {0}_zeros, str {0}_layout, int {0}_bits, SymInt {0}_out_features, "
    "SymInt {0}_in_features, SymInt {0}_group_size"
)
_LIBRARY = torch.library.Library("sarqc", "FRAGMENT")
_LIBRARY.define(
    f"w4a16_experts(Tensor x, {_WEIGHT.format('first')}, {_WEIGHT.format('second')}, Tensor offsets, Tensor tokens, "
    "Tensor slots, Tensor weights, str? backend=None) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_FIELDS = len(RepackedWeight._fields)


def _run(x: Tensor, *fields: Any) -> Tensor:
    gate_up, down = RepackedWeight(*fields[:_FIELDS]), RepackedWeight(*fields[_FIELDS : 2 * _FIELDS])
    routing = Routing(*fields[2 * _FIELDS : 2 * _FIELDS + 4])
    backend = fields[2 * _FIELDS + 4] if len(fields) > 2 * _FIELDS + 4 else None
    return _dispatched((x, gate_up, down, routing), backend)


def _fake(x: Tensor, *fields: Any) -> Tensor:
    return x.new_empty((x.shape[0], fields[_FIELDS + RepackedWeight._fields.index("out_features")]))


_LIBRARY.impl("w4a16_experts", _run, "CPU")
_LIBRARY.impl("w4a16_experts", _run, "CUDA")
torch.library.register_fake("sarqc::w4a16_experts", _fake, lib=_LIBRARY)
_OP = torch.ops.sarqc.w4a16_experts.default

"""Which tokens go to which experts: the sort of a layer's choices by expert, in one launch on a GPU.

The field's names for it: align, permute, sort of token-expert pairs. Experts are not padded to blocks: the kernels find
their blocks among ragged experts from `offsets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sarqc_kernels.backend import Implementation, pick, takes_all
from sarqc_kernels.checks import check_same_device
from sarqc_kernels.device import triton_unsupported
from sarqc_kernels.errors import ArgumentError
from sarqc_kernels.fast_path import takes_fast_path

__all__ = ["Routing", "implementations", "route"]


class Routing(NamedTuple):
    """Which tokens go to which experts, R = T k rows sorted by expert.

    offsets: int64 [E + 1], expert e has rows offsets[e] .. offsets[e + 1] - 1. tokens: int64 [R], the token behind each
    row. slots: int64 [k, T], the rows of each token in the order in which they are added. weights: floating [R], the
    router's weight of each row.
    """

    offsets: Tensor
    tokens: Tensor
    slots: Tensor
    weights: Tensor


def reference(choices: Tensor, weights: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`route` in plain torch: a stable sort and its inverse."""
    count, top_k = choices.shape
    chosen, order = torch.sort(choices.t().reshape(-1), stable=True)
    bounds = torch.arange(experts + 1, device=chosen.device, dtype=chosen.dtype)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(order.numel(), device=order.device)
    return (
        torch.searchsorted(chosen, bounds),
        order % max(1, count),
        rows.view(top_k, count).sort(0).values,
        weights.t().reshape(-1)[order],
    )


def _triton_unsupported(choices: Tensor, weights: Tensor, experts: int) -> str | None:
    return triton_unsupported(choices)


def _run_triton(choices: Tensor, weights: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sarqc_kernels.w4a16.triton import route as launcher

    return launcher.route(choices, weights, experts)


_REFERENCE = Implementation("reference", takes_all, reference)
_TRITON = Implementation("triton", _triton_unsupported, _run_triton)


def implementations(x: Tensor) -> Sequence[Implementation]:
    """What can run where `x` lies, in the order in which to try."""
    return (_REFERENCE, _TRITON) if x.is_cpu else (_TRITON, _REFERENCE)


def route(choices: Tensor, weights: Tensor, experts: int, *, backend: str | None = None) -> Routing:
    """Sort the choices of all tokens by expert, without a wait for the device.

    Args:
        choices: int64 [T, k], experts of each token, from 0 to `experts` - 1. Values are not checked.
        weights: floating [T, k], the router's weight of each choice.
        experts: how many there are.
        backend: see `sarqc_kernels.backend`.

    Returns:
        The routing. Rows of an expert stand in the order of choices, then tokens; a token's rows are added in the order
        of its experts.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit.
    """
    if choices.dim() != 2 or choices.dtype != torch.int64 or experts < 1:
        raise ArgumentError(f"choices is {choices.dtype} {list(choices.shape)} of {experts} experts: pass int64 [T, k]")
    if weights.shape != choices.shape or not weights.is_floating_point():
        raise ArgumentError(f"weights is {weights.dtype} {list(weights.shape)}: pass floating {list(choices.shape)}")
    check_same_device(choices=choices, weights=weights)
    if takes_fast_path(choices) and takes_fast_path(weights):
        return Routing(*_run(choices, weights, experts, backend))
    return Routing(*_OP(choices, weights, experts, backend))


def _run(
    choices: Tensor, weights: Tensor, experts: int, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = (choices, weights, experts)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = pick("route", implementations(choices), args, backend).run(*args)
    return result


def _fake(
    choices: Tensor, weights: Tensor, experts: int, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count, top_k = choices.shape
    rows = choices.new_empty((count * top_k,))
    return choices.new_empty((experts + 1,)), rows, choices.new_empty((top_k, count)), weights.new_empty(rows.shape)


_LIBRARY = torch.library.Library("sarqc", "FRAGMENT")
_LIBRARY.define(
    "route(Tensor choices, Tensor weights, int experts, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("route", _run, "CPU")
_LIBRARY.impl("route", _run, "CUDA")
torch.library.register_fake("sarqc::route", _fake, lib=_LIBRARY)
_OP = torch.ops.sarqc.route.default

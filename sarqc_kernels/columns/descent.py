"""Coordinate descent on a quantized weight: codes and scales improve each other, and no row becomes worse.

Given the codes, scales and zeros of a weight Q, the objective tr[E H E^T] with E = W - Q goes down further: one unknown
at a time takes its best value while all others keep theirs, group after group.

Codes. With all others kept, the best value of column j is q_j + (E H)_j / H_jj, rounded to the grid. Columns of a group
are taken in turn, each after the errors of those before it.

Scales. Q is linear in a row's scales, so with l = code - zero the best change of the scale of group g is
l_g (E H)_g^T / (l_g H_gg l_g^T). It is rounded to what can be stored.

What a change D of a group's weights saves is 2 D (E H)_g^T - D H_gg D^T: a row refuses a change that saves nothing.
Zeros stay what they are. CDQuant (arXiv 2406.17542) descends too, by the best column first; here they come in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sarqc_kernels.backend import Implementation, pick, takes_all
from sarqc_kernels.checks import check_bits, check_same_device, check_tensor
from sarqc_kernels.columns import descent_reference
from sarqc_kernels.columns.panels import too_large
from sarqc_kernels.device import fastest_first, triton_unsupported
from sarqc_kernels.errors import ArgumentError

__all__ = ["coordinate_descent", "implementations"]

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _cpu_unsupported(weight: Tensor, *_: object) -> str | None:
    from sarqc_kernels.columns import cpu_impl

    return cpu_impl.unsupported(weight)


def _cpu(
    weight: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, hessian: Tensor, bits: int, passes: int
) -> tuple[Tensor, Tensor]:
    from sarqc_kernels.columns import cpu_impl

    return cpu_impl.coordinate_descent(weight, codes, scales, zeros, hessian, bits, passes)


def _triton_unsupported(weight: Tensor, codes: Tensor, scales: Tensor, *_: object) -> str | None:
    columns = weight.shape[2]
    if reason := triton_unsupported(weight) or too_large(columns):
        return reason
    if columns * columns // scales.shape[2] >= 1 << 31:
        return f"a group of {columns // scales.shape[2]} by {columns} columns is beyond 32-bit indices"
    return None


def _triton(
    weight: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, hessian: Tensor, bits: int, passes: int
) -> tuple[Tensor, Tensor]:
    from sarqc_kernels.columns import descent_impl

    return descent_impl.coordinate_descent(weight, codes, scales, zeros, hessian, bits, passes)


_DESCENT = (
    Implementation("triton", _triton_unsupported, _triton),
    Implementation("cpu", _cpu_unsupported, _cpu),
    Implementation("reference", takes_all, descent_reference.coordinate_descent),
)


def implementations() -> dict[str, Sequence[Implementation]]:
    """Implementations of the operation, fastest first on a GPU; for `backend.explain`."""
    return {"coordinate_descent": _DESCENT}


def coordinate_descent(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    passes: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Better codes and scales of a quantized weight.

    Args:
        weight: fp32 [E, N, K].
        codes: uint8 [E, N, K], below 2^bits.
        scales: fp32, bf16 or fp16 [E, N, G], G dividing K.
        zeros: uint8 [E, N, G].
        hessian: fp32 [E, K, K], symmetric. An expert whose diagonal is not finite and positive everywhere keeps its
            codes and scales.
        bits: 2 to 8.
        passes: how often every group is improved; 0 returns copies.
        backend: a name from `backend.BACKENDS`, or None for the fastest.

    Returns:
        (codes, scales) like those given, in memory of their own.

    Raises:
        ArgumentError: another dtype, shape or device.
    """
    if weight.dim() != 3 or weight.dtype != torch.float32:
        raise ArgumentError(
            f"weight is {weight.dtype} {list(weight.shape)}: pass torch.float32 [experts, rows, columns]"
        )
    experts, rows, columns = weight.shape
    check_bits(bits)
    check_tensor("codes", codes, (experts, rows, columns), torch.uint8)
    groups = scales.shape[-1] if scales.dim() == 3 else 0
    fits = groups > 0 and scales.shape[:2] == weight.shape[:2] and not columns % groups
    if scales.dtype not in SCALE_DTYPES or not fits:
        raise ArgumentError(
            f"scales is {scales.dtype} {list(scales.shape)}: pass fp32, bf16 or fp16 [{experts}, {rows}, G], "
            f"G dividing {columns}"
        )
    check_tensor("zeros", zeros, (experts, rows, groups), torch.uint8)
    check_tensor("hessian", hessian, (experts, columns, columns), torch.float32)
    if passes < 0:
        raise ArgumentError(f"passes = {passes} is negative: use a whole number from 0 up")
    check_same_device(weight=weight, codes=codes, scales=scales, zeros=zeros, hessian=hessian)
    if not passes or not weight.numel():
        return codes.clone(), scales.clone()
    out: tuple[Tensor, Tensor] = _coordinate_descent(weight, codes, scales, zeros, hessian, bits, passes, backend)
    return out


@torch.library.custom_op("sarqc::coordinate_descent", mutates_args=())
def _coordinate_descent(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    hessian: Tensor,
    bits: int,
    passes: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    args = (weight, codes, scales, zeros, hessian, bits, passes)
    result, better = pick("coordinate_descent", fastest_first(_DESCENT, weight), args, backend).run(*args)
    return result, better


@_coordinate_descent.register_fake
def _(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    hessian: Tensor,
    bits: int,
    passes: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    return codes.new_empty(codes.shape), scales.new_empty(scales.shape)

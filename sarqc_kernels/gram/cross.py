"""Cross-Gram accumulation: C += R^T X for rows X of inputs and rows R of what the outputs should gain.

Error correction needs it beside the Gram: the target of a layer is W + a C H^-1. It is a full product, 2 T N K flops,
where the Gram is half of one; on tensor cores it is therefore made in 16 bits. X is exact in its own dtype. Beside X in
bf16, R in fp32 is split into two bf16 halves, hi + lo, that are multiplied one after another: what is lost of R is
2^-16 of it at most. Other pairs of dtypes meet in fp32, as three TF32 products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sarqc_kernels.backend import Implementation, pick, takes_all
from sarqc_kernels.checks import check_same_device
from sarqc_kernels.device import fastest_first, triton_unsupported
from sarqc_kernels.errors import ArgumentError

__all__ = ["cross_gram_accumulate_", "implementations"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _reference(cross: Tensor, residual: Tensor, x: Tensor) -> None:
    """fp32 products and sums."""
    cross.addmm_(residual.float().T, x.float())


def _unsupported(cross: Tensor, residual: Tensor, x: Tensor) -> str | None:
    """Why the Triton kernel cannot take the call; None where it can."""
    if reason := triton_unsupported(x):
        return reason
    if not cross.is_contiguous():
        return "cross is not contiguous"
    if any(each.shape[1] > 1 and each.stride(1) != 1 for each in (residual, x)):
        return "the elements of a row of residual or x do not lie side by side"
    if max(64 * residual.stride(0), 64 * x.stride(0), x.shape[0]) >= 1 << 31:
        return f"x {list(x.shape)} with a row stride of {x.stride(0)} is beyond 32-bit indices of rows and tiles"
    return None


def _triton(*args: Any) -> None:
    from sarqc_kernels.gram import cross_impl

    cross_impl.cross_gram_accumulate_(*args)


def _cpu_unsupported(*args: Any) -> str | None:
    from sarqc_kernels.gram import cpu_impl

    return cpu_impl.cross_unsupported(*args)


def _cpu(*args: Any) -> None:
    from sarqc_kernels.gram import cpu_impl

    cpu_impl.cross_gram_accumulate_(*args)


_CROSS = (
    Implementation("triton", _unsupported, _triton),
    Implementation("cpu", _cpu_unsupported, _cpu),
    Implementation("reference", takes_all, _reference),
)


def implementations() -> dict[str, Sequence[Implementation]]:
    """Implementations of the operation, fastest first on a GPU; for `backend.explain`."""
    return {"cross_gram_accumulate_": _CROSS}


def cross_gram_accumulate_(cross: Tensor, residual: Tensor, x: Tensor, *, backend: str | None = None) -> None:
    """Add one batch of rows to a running cross-Gram, in place.

    Args:
        cross: fp32 [N, K]; gains residual^T x.
        residual: bf16, fp16 or fp32 [T, N].
        x: bf16, fp16 or fp32 [T, K].
        backend: a name from `backend.BACKENDS`, or None for the fastest.

    Raises:
        ArgumentError: another dtype, shape or device.
    """
    if cross.dim() != 2 or cross.dtype != torch.float32:
        raise ArgumentError(f"cross is {cross.dtype} {list(cross.shape)}: pass torch.float32 [outputs, inputs]")
    for name, rows, width in (("residual", residual, cross.shape[0]), ("x", x, cross.shape[1])):
        if rows.dim() != 2 or rows.shape[1] != width or rows.dtype not in DTYPES or len(rows) != len(x):
            raise ArgumentError(
                f"{name} is {rows.dtype} {list(rows.shape)}: pass bf16, fp16 or fp32 [{len(x)}, {width}]"
            )
    check_same_device(cross=cross, residual=residual, x=x)
    _cross_gram_accumulate_(cross, residual, x, backend)


@torch.library.custom_op("sarqc::cross_gram_accumulate_", mutates_args=("cross",))
def _cross_gram_accumulate_(cross: Tensor, residual: Tensor, x: Tensor, backend: str | None = None) -> None:
    args = (cross, residual, x)
    pick("cross_gram_accumulate_", fastest_first(_CROSS, x), args, backend).run(*args)


@_cross_gram_accumulate_.register_fake
def _(cross: Tensor, residual: Tensor, x: Tensor, backend: str | None = None) -> None:
    return None

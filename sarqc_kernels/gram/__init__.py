"""Gram accumulation: G_e += X_e^T X_e for the rows X_e that each expert saw, with the row counts and sums of |x|.

Everything the method needs to know of the inputs is additive: the Gram, the number of rows, the sum of |x| per input.
So calibration streams: one call per batch of activations, no division until the sums are read. The Gram is symmetric
and only its lower triangle is kept up to date (half the work); `symmetrize_` mirrors it once, when somebody reads it,
and `gram_finalize` makes of the sums the regularised matrix that is factored, on the device and in one pass.
A dense layer is one expert that sees every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sarqc_kernels.backend import Implementation, pick, takes_all
from sarqc_kernels.checks import check_cut, check_offsets, check_same_device, check_tensor
from sarqc_kernels.device import fastest_first, triton_unsupported
from sarqc_kernels.errors import ArgumentError
from sarqc_kernels.gram import cholesky, cross, reference
from sarqc_kernels.gram.cholesky import cholesky_upper
from sarqc_kernels.gram.cross import cross_gram_accumulate_

__all__ = ["cholesky_upper", "cross_gram_accumulate_", "gram_accumulate_", "gram_finalize", "implementations",
           "symmetrize_"]  # fmt: skip

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

LARGEST_ADDRESS = 1 << 31  # rows, and elements from one end of a tile to the other, that a 32-bit number can count


def _accumulate_unsupported(
    gram: Tensor, rows: Tensor, abs_sum: Tensor, x: Tensor, offsets: Tensor | None
) -> str | None:
    """Why the Triton kernel cannot take the call; None where it can."""
    if reason := triton_unsupported(x):
        return reason
    if not (gram.is_contiguous() and rows.is_contiguous() and abs_sum.is_contiguous()):
        return "gram, rows or abs_sum is not contiguous"
    if offsets is not None and not offsets.is_contiguous():
        return "offsets is not contiguous"
    if not x.shape[1]:
        return "x has no inputs"
    if x.shape[1] > 1 and x.stride(1) != 1:
        return f"x has a stride of {x.stride(1)} between the inputs of a row, which have to lie side by side"
    if max(x.shape[0], 64 * x.stride(0), 256 * x.shape[1]) >= LARGEST_ADDRESS:
        return f"x {list(x.shape)} with a row stride of {x.stride(0)} is beyond 32-bit indices of rows and tiles"
    return None


def _finalize_unsupported(gram: Tensor, *others: Tensor | float) -> str | None:
    """Why the Triton kernels cannot take the call; None where they can."""
    if reason := triton_unsupported(gram):
        return reason
    tensors = [gram, *(other for other in others if isinstance(other, Tensor))]
    return None if all(tensor.is_contiguous() for tensor in tensors) else "an argument is not contiguous"


def _cpu_unsupported(*args: Any) -> str | None:
    from sarqc_kernels.gram import cpu_impl

    return cpu_impl.gram_unsupported(*args)


def _cpu_accumulate(*args: Any) -> None:
    from sarqc_kernels.gram import cpu_impl

    cpu_impl.gram_accumulate_(*args)


def _cpu_finalize_unsupported(*args: Any) -> str | None:
    from sarqc_kernels.gram import cpu_impl

    return cpu_impl.finalize_unsupported(*args)


def _cpu_finalize(*args: Any) -> Tensor:
    from sarqc_kernels.gram import cpu_impl

    return cpu_impl.gram_finalize(*args)


def _triton_accumulate(*args: Any) -> None:
    from sarqc_kernels.gram import triton_impl

    triton_impl.gram_accumulate_(*args)


def _triton_finalize(*args: Any) -> Tensor:
    from sarqc_kernels.gram import finalize_impl

    return finalize_impl.gram_finalize(*args)


_ACCUMULATE = (
    Implementation("triton", _accumulate_unsupported, _triton_accumulate),
    Implementation("cpu", _cpu_unsupported, _cpu_accumulate),
    Implementation("reference", takes_all, reference.gram_accumulate_),
)
_FINALIZE = (
    Implementation("triton", _finalize_unsupported, _triton_finalize),
    Implementation("cpu", _cpu_finalize_unsupported, _cpu_finalize),
    Implementation("reference", takes_all, reference.gram_finalize),
)


def implementations() -> dict[str, Sequence[Implementation]]:
    """What there is of each operation, fastest first on a card; for `backend.explain`."""
    tables = {"gram_accumulate_": _ACCUMULATE, "gram_finalize": _FINALIZE}
    return {**tables, **cross.implementations(), **cholesky.implementations()}


def gram_accumulate_(
    gram: Tensor, rows: Tensor, abs_sum: Tensor, x: Tensor, offsets: Tensor | None, *, backend: str | None = None
) -> None:
    """Add one batch of activations to the running sums, in place.

    Products and sums are fp32. NaN or Inf in `x` ends up in its expert's sums.

    Args:
        gram: fp32 [E, K, K]. X_e^T X_e is added to the lower triangle with the diagonal; the upper triangle is
            undefined until `symmetrize_`.
        rows: int64 [E]; the number of rows is added.
        abs_sum: fp32 [E, K]; the sums of |x| are added.
        x: bf16, fp16 or fp32 [T, K], rows sorted by expert.
        offsets: int64 [E + 1]. Expert e has rows offsets[e] .. offsets[e + 1] - 1, or none; rows outside of offsets[0]
            .. offsets[E] are not read. None: E = 1, all rows.
        backend: See `sarqc_kernels.backend`.

    Raises:
        ArgumentError: Other shapes, dtypes or devices. The values of `offsets` are checked on the CPU only.
    """
    if gram.dim() != 3 or gram.shape[1] != gram.shape[2] or gram.dtype != torch.float32:
        raise ArgumentError(f"gram is {gram.dtype} {list(gram.shape)}: pass torch.float32 [experts, inputs, inputs]")
    experts, inputs = gram.shape[:2]
    check_tensor("rows", rows, (experts,), torch.int64)
    check_tensor("abs_sum", abs_sum, (experts, inputs), torch.float32)
    if x.dim() != 2 or x.shape[1] != inputs or x.dtype not in ACTIVATION_DTYPES:
        raise ArgumentError(f"x is {x.dtype} {list(x.shape)}: pass bf16, fp16 or fp32 [tokens, {inputs}]")
    check_offsets(offsets, experts)
    check_same_device(gram=gram, rows=rows, abs_sum=abs_sum, x=x, offsets=offsets)
    _gram_accumulate_(gram, rows, abs_sum, x, offsets, backend)


def symmetrize_(gram: Tensor) -> Tensor:
    """Copy the lower triangle of every matrix over its upper one, in place.

    Args:
        gram: Floating [..., K, K].

    Returns:
        `gram`.

    Raises:
        ArgumentError: The matrices are not square.
    """
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ArgumentError(f"gram is {list(gram.shape)}: pass [..., inputs, inputs]")
    return reference.symmetrize_(gram)


def gram_finalize(
    gram: Tensor, rows: Tensor, saliency: Tensor, reg_lambda: Tensor, damp: float, *, backend: str | None = None
) -> Tensor:
    """The matrix that is factored: H + diag(lambda_e * saliency_e) + damp * mean(diag H_e) I with H = gram / rows.

    It does not wait for the device.

    Args:
        gram: fp32 [E, K, K], its lower triangle, as `gram_accumulate_` leaves it.
        rows: int64 [E]; 0 counts as 1.
        saliency: fp32 [E, K].
        reg_lambda: fp32 [E].
        damp: Relative to the mean of H's diagonal, which counts as 1 where it is not above zero.
        backend: See `sarqc_kernels.backend`.

    Returns:
        fp32 [E, K, K] in memory of its own, exactly symmetric.

    Raises:
        ArgumentError: Other shapes, dtypes or devices.
    """
    if gram.dim() != 3 or gram.shape[1] != gram.shape[2] or gram.dtype != torch.float32:
        raise ArgumentError(f"gram is {gram.dtype} {list(gram.shape)}: pass torch.float32 [experts, inputs, inputs]")
    experts, inputs = gram.shape[:2]
    check_tensor("rows", rows, (experts,), torch.int64)
    check_tensor("saliency", saliency, (experts, inputs), torch.float32)
    check_tensor("reg_lambda", reg_lambda, (experts,), torch.float32)
    check_same_device(gram=gram, rows=rows, saliency=saliency, reg_lambda=reg_lambda)
    out: Tensor = _gram_finalize(gram, rows, saliency, reg_lambda, damp, backend)
    return out


@torch.library.custom_op("sarqc::gram_accumulate_", mutates_args=("gram", "rows", "abs_sum"))
def _gram_accumulate_(
    gram: Tensor, rows: Tensor, abs_sum: Tensor, x: Tensor, offsets: Tensor | None, backend: str | None = None
) -> None:
    check_cut(offsets, x.shape[0])
    args = (gram, rows, abs_sum, x, offsets)
    pick("gram_accumulate_", fastest_first(_ACCUMULATE, x), args, backend).run(*args)


@_gram_accumulate_.register_fake
def _(
    gram: Tensor, rows: Tensor, abs_sum: Tensor, x: Tensor, offsets: Tensor | None, backend: str | None = None
) -> None:
    return None


@torch.library.custom_op("sarqc::gram_finalize", mutates_args=())
def _gram_finalize(
    gram: Tensor, rows: Tensor, saliency: Tensor, reg_lambda: Tensor, damp: float, backend: str | None = None
) -> Tensor:
    args = (gram, rows, saliency, reg_lambda, damp)
    out: Tensor = pick("gram_finalize", fastest_first(_FINALIZE, gram), args, backend).run(*args)
    return out


@_gram_finalize.register_fake
def _(
    gram: Tensor, rows: Tensor, saliency: Tensor, reg_lambda: Tensor, damp: float, backend: str | None = None
) -> Tensor:
    return torch.empty_like(gram, memory_format=torch.contiguous_format)

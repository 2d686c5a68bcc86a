"""Grams on a CPU (csrc/gram_cpu.cpp).

Sums of bf16 activations with AMX: products and sums in fp32, in one order whatever the number of threads. The matrix
that is factored is made of the sums in one pass; its bits are the reference's.
"""

from __future__ import annotations

import ctypes
import functools
from itertools import pairwise

import torch
from torch import Tensor

from sarqc_kernels import cpu_build
from sarqc_kernels.cpu_parts import in_parts
from sarqc_kernels.errors import BackendError
from sarqc_kernels.gram.reference import add_to_diagonal_

__all__ = [
    "cross_gram_accumulate_",
    "cross_unsupported",
    "finalize_unsupported",
    "gram_accumulate_",
    "gram_finalize",
    "gram_unsupported",
    "unsupported_reason",
]

PORTABLE, TILES = 0, 1
"""`Kind` of csrc/gram_cpu.cpp: plain C++, which only the tests run, and AMX."""
SHARED_WORK = 1 << 28
"""Multiplications from which on starting threads costs little beside them: about a millisecond on one."""


SHARED_SIZE = 1 << 20
"""The same of elements that are read and written."""


class Call(ctypes.Structure):
    """`struct Gram` of csrc/gram_cpu.cpp, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("left", "right", "out", "abs_sum")),
        *((name, ctypes.c_int64) for name in
          ("rows", "height", "width", "left_stride", "right_stride", "out_stride", "lower", "kind")),
    )  # fmt: skip


class Mean(ctypes.Structure):
    """`struct Mean` of csrc/gram_cpu.cpp, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("sum", "divisor", "out")),
        *((name, ctypes.c_int64) for name in ("experts", "size")),
    )


def gram_accumulate_(
    gram: Tensor, rows: Tensor, abs_sum: Tensor, x: Tensor, offsets: Tensor | None, kind: int = TILES
) -> None:
    """`sarqc_kernels.gram.gram_accumulate_` on a CPU."""
    bounds = [0, x.shape[0]] if offsets is None else offsets.tolist()
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        rows[expert] += end - begin
        part = x[begin:end]
        _add(gram[expert], part, part, abs_sum[expert], kind)


def cross_gram_accumulate_(cross: Tensor, residual: Tensor, x: Tensor, kind: int = TILES) -> None:
    """`sarqc_kernels.gram.cross_gram_accumulate_` on a CPU."""
    _add(cross, residual, x, None, kind)


def gram_finalize(gram: Tensor, rows: Tensor, saliency: Tensor, reg_lambda: Tensor, damp: float) -> Tensor:
    """`sarqc_kernels.gram.gram_finalize` on a CPU."""
    out, divisor = torch.empty_like(gram), rows.clamp(min=1).float()
    call = Mean(
        sum=gram.data_ptr(), divisor=divisor.data_ptr(), out=out.data_ptr(), experts=len(gram), size=gram.shape[1]
    )
    in_parts(_library().sarqc_mean, call, torch.get_num_threads() if gram.numel() >= SHARED_SIZE else 1)
    return add_to_diagonal_(out, saliency, reg_lambda, damp)


def finalize_unsupported(gram: Tensor, *_: object) -> str | None:
    """Why the call cannot be taken; None where it can."""
    if gram.device.type != "cpu":
        return f"tensors are on {gram.device.type}, not on the CPU"
    if not gram.is_contiguous():
        return "gram is not contiguous"
    return _no_library()


def gram_unsupported(gram: Tensor, rows: Tensor, abs_sum: Tensor, x: Tensor, offsets: Tensor | None) -> str | None:
    """Why the call cannot be taken; None where it can."""
    if not (gram.is_contiguous() and abs_sum.is_contiguous()):
        return "gram or abs_sum is not contiguous"
    return _unsupported(x)


def cross_unsupported(cross: Tensor, residual: Tensor, x: Tensor) -> str | None:
    """Why the call cannot be taken; None where it can."""
    if not cross.is_contiguous():
        return "cross is not contiguous"
    return _unsupported(residual) or _unsupported(x)


def _unsupported(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"tensors are on {x.device.type}, not on the CPU"
    if x.dtype != torch.bfloat16:
        return f"activations are {x.dtype}, not torch.bfloat16"
    if x.shape[1] > 1 and x.stride(1) != 1:
        return "the elements of a row do not lie side by side"
    return unsupported_reason()


@functools.cache
def unsupported_reason() -> str | None:
    """The reason why this implementation does not run on this machine; None where it does."""
    if reason := _no_library():
        return reason
    return None if _library().sarqc_gram_kind() == TILES else "this processor has no AMX tiles for bf16"


@functools.cache
def _no_library() -> str | None:
    try:
        _library()
    except BackendError as error:
        return str(error)
    return None


def _library() -> ctypes.CDLL:
    return cpu_build.library("gram_cpu", gram=Call, mean=Mean)


def _add(out: Tensor, left: Tensor, right: Tensor, abs_sum: Tensor | None, kind: int) -> None:
    """out += left^T right; on and below the diagonal, and the sums of |left|, where those are asked for."""
    lower = abs_sum is not None
    call = Call(
        left=left.data_ptr(),
        right=right.data_ptr(),
        out=out.data_ptr(),
        abs_sum=0 if abs_sum is None else abs_sum.data_ptr(),
        rows=len(left),
        height=left.shape[1],
        width=right.shape[1],
        left_stride=left.stride(0),
        right_stride=right.stride(0),
        out_stride=out.stride(0),
        lower=lower,
        kind=kind,
    )
    work = len(left) * out.numel() // (2 if lower else 1)
    in_parts(_library().sarqc_gram, call, torch.get_num_threads() if work >= SHARED_WORK else 1)

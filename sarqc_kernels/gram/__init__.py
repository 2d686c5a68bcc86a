"""Gram accumulation: G_e += X_e^T X_e for the rows X_e that each expert saw, with the row counts and sums of |x|.

Everything the method needs to know of the inputs is additive: the Gram, the number of rows, the sum of |x| per input.
So calibration streams: one call per batch of activations, no division until the sums are read. The Gram is symmetric
and only its lower triangle is kept up to date (half the work); `symmetrize_` mirrors it once, when somebody reads it.
A dense layer is one expert that sees every row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sarqc_kernels.backend import Implementation, pick, takes_all
from sarqc_kernels.checks import check_cut, check_offsets, check_same_device, check_tensor
from sarqc_kernels.errors import ArgumentError
from sarqc_kernels.gram import reference

__all__ = ["gram_accumulate_", "symmetrize_"]

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_IMPLEMENTATIONS = (Implementation("reference", takes_all, reference.gram_accumulate_),)


def gram_accumulate_(
    gram: Tensor, rows: Tensor, abs_sum: Tensor, x: Tensor, offsets: Tensor | None, *, backend: str | None = None
) -> None:
    """Add one batch of activations to the running sums, in place.

    gram: fp32 [E, K, K]; the lower triangle with the diagonal gains X_e^T X_e, what is above it is undefined until
    `symmetrize_`. rows: int64 [E]; gains the number of rows. abs_sum: fp32 [E, K]; gains the sums of |x|.
    x: bf16, fp16 or fp32 [T, K], rows sorted by expert. offsets: int64 [E + 1], expert e has rows offsets[e] ..
    offsets[e + 1] - 1 (none is fine); rows outside of offsets[0] .. offsets[E] are not read. None: E = 1, all rows.
    Products and sums are fp32. NaN or Inf in x goes into its expert's sums, where the reader finds it.
    Raises ArgumentError for other shapes, dtypes or devices; what `offsets` holds is checked on the CPU only.
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
    """Copy the lower triangle of every matrix of gram [..., K, K] over the upper one, in place; returns gram."""
    return reference.symmetrize_(gram)


@torch.library.custom_op("sarqc::gram_accumulate_", mutates_args=("gram", "rows", "abs_sum"))
def _gram_accumulate_(
    gram: Tensor, rows: Tensor, abs_sum: Tensor, x: Tensor, offsets: Tensor | None, backend: str | None = None
) -> None:
    check_cut(offsets, x.shape[0])
    args = (gram, rows, abs_sum, x, offsets)
    pick("gram_accumulate_", _IMPLEMENTATIONS, args, backend).run(*args)


@_gram_accumulate_.register_fake
def _(
    gram: Tensor, rows: Tensor, abs_sum: Tensor, x: Tensor, offsets: Tensor | None, backend: str | None = None
) -> None:
    return None

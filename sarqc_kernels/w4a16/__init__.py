"""W4A16: activations times a weight that stays packed, dense or grouped by expert. (2 to 8 bits, despite the name.)

y_t = W_e x_t + b_e for the expert e that row t belongs to, W_e = (code - zero) * scale. The reference unpacks a tile of
rows of W, multiplies and forgets it; faster implementations never write the weight out at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sarqc_kernels.backend import Implementation, pick, takes_all
from sarqc_kernels.checks import check_bits, check_cut, check_grid, check_offsets, check_same_device
from sarqc_kernels.errors import ArgumentError
from sarqc_kernels.packing import words_per_row
from sarqc_kernels.w4a16 import reference

__all__ = ["w4a16_matmul"]

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_IMPLEMENTATIONS = (Implementation("reference", takes_all, reference.w4a16_matmul),)


def w4a16_matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    offsets: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    backend: str | None = None,
) -> Tensor:
    """x times the transpose of a packed weight, expert by expert.

    x: bf16, fp16 or fp32 [T, K], rows sorted by expert. qweight: int32 [E, N, ceil(K * bits / 32)] as
    `packing.pack` writes it. scales: floating [E, N, G] with G dividing K. zeros: uint8 [E, N, G], or None for
    symmetric codes (2^(bits-1)). offsets: int64 [E + 1], expert e has rows offsets[e] .. offsets[e + 1] - 1; None:
    E = 1, all rows. bias: floating [E, N] or None. bits: 2 to 8.
    Returns [T, N] in x's dtype; rows outside of offsets[0] .. offsets[E] are 0.

    Rounding: (code - zero) * scale in fp32, rounded once to x's dtype; products summed in fp32 at least; the bias,
    rounded to x's dtype, joins the sum; one rounding to x's dtype at the end. With identity activations the result is
    the dequantized weight exactly. No gradient is defined.
    Raises ArgumentError for other shapes, dtypes or devices; what `offsets` holds is checked on the CPU only.
    """
    check_bits(bits)
    if x.dim() != 2 or x.dtype not in ACTIVATION_DTYPES:
        raise ArgumentError(f"x is {x.dtype} {list(x.shape)}: pass bf16, fp16 or fp32 [tokens, inputs]")
    inputs = x.shape[1]
    if qweight.dim() != 3 or qweight.dtype != torch.int32 or qweight.shape[2] != words_per_row(inputs, bits):
        raise ArgumentError(
            f"qweight is {qweight.dtype} {list(qweight.shape)}: {inputs} inputs of {bits} bits are torch.int32 "
            f"[experts, outputs, {words_per_row(inputs, bits)}]"
        )
    experts, outputs = qweight.shape[:2]
    check_grid((experts, outputs, inputs), scales, zeros)
    if bias is not None and (tuple(bias.shape) != (experts, outputs) or not bias.is_floating_point()):
        raise ArgumentError(f"bias is {bias.dtype} {list(bias.shape)}: pass floating [{experts}, {outputs}] or None")
    check_offsets(offsets, experts)
    check_same_device(x=x, qweight=qweight, scales=scales, zeros=zeros, offsets=offsets, bias=bias)
    out: Tensor = _w4a16_matmul(x, qweight, scales, zeros, offsets, bias, bits, backend)
    return out


@torch.library.custom_op("sarqc::w4a16_matmul", mutates_args=())
def _w4a16_matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    offsets: Tensor | None,
    bias: Tensor | None,
    bits: int,
    backend: str | None = None,
) -> Tensor:
    check_cut(offsets, x.shape[0])
    args = (x, qweight, scales, zeros, offsets, bias, bits)
    out: Tensor = pick("w4a16_matmul", _IMPLEMENTATIONS, args, backend).run(*args)
    return out


@_w4a16_matmul.register_fake
def _(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    offsets: Tensor | None,
    bias: Tensor | None,
    bits: int,
    backend: str | None = None,
) -> Tensor:
    return x.new_empty((x.shape[0], qweight.shape[1]))

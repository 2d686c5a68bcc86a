"""Dequantization of source weights: FP8, MXFP8, MXFP4 and NVFP4 checkpoints to bf16, fp16 or fp32.

Every format is an element code times a scale that a block of elements shares:

    out[r, c] = value(code[r, c]) * scale[r // block_rows, c // block_columns]

| format | element | scales | blocks |
|---|---|---|---|
| FP8 by block (DeepSeek-V3, Qwen3-FP8, MiniMax-M2) | e4m3 | fp32 or bf16 (`weight_scale_inv`), or e8m0 | 128 x 128 |
| FP8 by tensor or output channel | e4m3 | fp32 or bf16 | the whole matrix, or a row |
| MXFP8 | e4m3 | e8m0 | 1 x 32 |
| MXFP4 (gpt-oss, DeepSeek-V4 experts) | e2m1, two to a byte | e8m0 | 1 x 32 |
| NVFP4 | e2m1, two to a byte | e4m3, with one fp32 scale of the tensor | 1 x 16 |

e4m3 is float8_e4m3fn, e2m1 has the values 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign, e8m0 is 2^(byte - 127) (OCP
Microscaling Formats specification 1.0). The product is one fp32 multiplication, rounded once to the output dtype; that
is what transformers and compressed-tensors compute, and tests hold it to theirs bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sarqc_kernels.backend import Implementation, pick, takes_all
from sarqc_kernels.checks import check_same_device
from sarqc_kernels.dequant import reference
from sarqc_kernels.device import fastest_first, triton_unsupported
from sarqc_kernels.errors import ArgumentError

__all__ = ["dequantize_fp4", "dequantize_fp8", "implementations"]

OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOAT_SCALES = (torch.float32, torch.bfloat16, torch.float16)
EXPONENT_SCALES = (torch.uint8, torch.float8_e8m0fnu)
PACKED_DTYPES = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)

_LARGEST_BLOCK = 1 << 30  # a block edge that no matrix exceeds: "the whole axis"


def _triton(*args: Any) -> Tensor:
    from sarqc_kernels.dequant import dequant_impl

    return dequant_impl.dequantize(*args)


def _triton_unsupported(codes: Tensor, *_: object) -> str | None:
    return triton_unsupported(codes)


_DEQUANTIZE = (
    Implementation("triton", _triton_unsupported, _triton),
    Implementation("reference", takes_all, reference.dequantize),
)


def implementations() -> dict[str, Sequence[Implementation]]:
    """Implementations of the operation, fastest first on a GPU; for `backend.explain`."""
    return {"dequantize": _DEQUANTIZE}


def dequantize_fp8(
    weight: Tensor,
    scales: Tensor,
    *,
    dtype: torch.dtype,
    block: tuple[int, int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Expand an FP8 weight.

    Args:
        weight: float8_e4m3fn [..., N, K].
        scales: fp32, bf16 or fp16, or e8m0 as float8_e8m0fnu or uint8; [..., R, C] with the leading dimensions of
            `weight`, or a single element for the whole tensor. It multiplies (`weight_scale_inv` of DeepSeek-V3 does).
        dtype: bf16, fp16 or fp32.
        block: rows and columns that share a scale, so R = ceil(N / block[0]) and C = ceil(K / block[1]): the last block
            of an axis may be smaller. None: R divides N, and C divides K.
        backend: a name from `backend.BACKENDS`, or None for the fastest.

    Returns:
        `dtype` [..., N, K], contiguous. NaN codes stay NaN.

    Raises:
        ArgumentError: another dtype or shape, or tensors on different devices.
    """
    if weight.dtype != torch.float8_e4m3fn or weight.dim() < 2:
        raise ArgumentError(f"weight is {weight.dtype} {list(weight.shape)}: pass torch.float8_e4m3fn [..., N, K]")
    if scales.dtype not in (*FLOAT_SCALES, *EXPONENT_SCALES):
        raise ArgumentError(f"scales is {scales.dtype}: pass fp32, bf16, fp16, float8_e8m0fnu or uint8 (e8m0)")
    return _call(weight.view(torch.uint8), scales, None, block, dtype, packed=False, divide=False, backend=backend)


def dequantize_fp4(
    packed: Tensor,
    scales: Tensor,
    *,
    dtype: torch.dtype,
    global_scale: Tensor | None = None,
    divide: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Expand an MXFP4 or NVFP4 weight.

    Args:
        packed: uint8, int8 or float4_e2m1fn_x2 [..., N, K / 2], the even column in the low nibble; or blocks
            [..., N, G, K / (2 G)], as gpt-oss stores them.
        scales: [..., N, G], K / G even. uint8 or float8_e8m0fnu: e8m0 (MXFP4). float8_e4m3fn: NVFP4. fp32, bf16 and
            fp16 are taken too.
        dtype: bf16, fp16 or fp32.
        global_scale: fp32 with one element, the second level of NVFP4. A scale is first combined with it, in fp32.
        divide: scale / global_scale (compressed-tensors); otherwise scale * global_scale (ModelOpt's
            `weight_scale_2`).
        backend: a name from `backend.BACKENDS`, or None for the fastest.

    Returns:
        `dtype` [..., N, K], contiguous. gpt-oss multiplies by its transpose: take `.mT` of it.

    Raises:
        ArgumentError: another dtype or shape, or tensors on different devices.
    """
    if packed.dim() == scales.dim() + 1 and packed.dim() > 2:
        packed = packed.flatten(-2)
    if packed.dtype not in PACKED_DTYPES or packed.dim() < 2:
        raise ArgumentError(f"packed is {packed.dtype} {list(packed.shape)}: pass uint8 [..., N, K / 2]")
    if scales.dtype not in (*FLOAT_SCALES, *EXPONENT_SCALES, torch.float8_e4m3fn):
        raise ArgumentError(f"scales is {scales.dtype}: pass uint8 or float8_e8m0fnu (MXFP4), or float8_e4m3fn (NVFP4)")
    if scales.dim() != packed.dim() or scales.shape[-2] != packed.shape[-2]:
        raise ArgumentError(
            f"scales is {list(scales.shape)} with packed {list(packed.shape)}: pass [..., {packed.shape[-2]}, groups]"
        )
    if scales.shape[-1] and packed.shape[-1] % scales.shape[-1]:
        raise ArgumentError(
            f"scales has {scales.shape[-1]} groups of {packed.shape[-1]} bytes: each group is a whole number of bytes"
        )
    if global_scale is not None and (global_scale.dtype != torch.float32 or global_scale.numel() != 1):
        raise ArgumentError(f"global_scale is {global_scale.dtype} {list(global_scale.shape)}: pass one fp32 element")
    return _call(packed.view(torch.uint8), scales, global_scale, None, dtype, packed=True, divide=divide,
                 backend=backend)  # fmt: skip


def _call(
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    block: tuple[int, int] | None,
    dtype: torch.dtype,
    *,
    packed: bool,
    divide: bool,
    backend: str | None,
) -> Tensor:
    """Bring everything to [B, N, K] and [B, R, C], check it, run the operation, and restore the leading dimensions."""
    if dtype not in OUTPUT_DTYPES:
        raise ArgumentError(f"dtype = {dtype} is not an output: use torch.bfloat16, torch.float16 or torch.float32")
    check_same_device(codes=codes, scales=scales, global_scale=global_scale)
    (*leading, rows, width), batch = codes.shape, math.prod(codes.shape[:-2])
    columns = width * (2 if packed else 1)
    if scales.numel() == 1:
        scales, block = scales.reshape(1, 1, 1).expand(batch, 1, 1), (_LARGEST_BLOCK, _LARGEST_BLOCK)
    elif scales.dim() != codes.dim() or list(scales.shape[:-2]) != leading:
        raise ArgumentError(
            f"scales is {list(scales.shape)} with a weight {[*leading, rows, columns]}: pass one scale, or {leading} "
            "and the numbers of row and column blocks"
        )
    else:
        block = _block(rows, columns, scales.shape[-2], scales.shape[-1], block)
    kind = "e8m0" if scales.dtype in EXPONENT_SCALES else "e4m3" if scales.dtype == torch.float8_e4m3fn else "float"
    stored = scales if kind == "float" else scales.view(torch.uint8)
    out: Tensor = _dequantize(
        codes.reshape(batch, rows, width).contiguous(),
        stored.reshape(batch, *scales.shape[-2:]).contiguous(),
        global_scale,
        *block,
        dtype,
        packed,
        kind,
        divide,
        backend,
    )
    return out.view(*leading, rows, columns)


def _block(rows: int, columns: int, down: int, across: int, block: tuple[int, int] | None) -> tuple[int, int]:
    """Edges of a scale's block; checks that `down` by `across` of them cover the weight."""
    if block is None:
        if not (down and across) or rows % down or columns % across:
            raise ArgumentError(
                f"scales has {down} x {across} blocks, which do not divide a weight of {rows} x {columns}: pass block"
            )
        block = (rows // down, columns // across)
    block = (max(1, block[0]), max(1, block[1]))
    if (-(-rows // block[0]), -(-columns // block[1])) != (down, across):
        raise ArgumentError(
            f"block = {block} makes {-(-rows // block[0])} x {-(-columns // block[1])} blocks of a weight of {rows} x "
            f"{columns}, and scales has {down} x {across}: pass the block that the scales were made with"
        )
    return block


@torch.library.custom_op("sarqc::dequantize", mutates_args=())
def _dequantize(
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype,
    packed: bool,
    kind: str,
    divide: bool,
    backend: str | None = None,
) -> Tensor:
    args = (codes, scales, global_scale, block_rows, block_columns, dtype, packed, kind, divide)
    out: Tensor = pick("dequantize", fastest_first(_DEQUANTIZE, codes), args, backend).run(*args)
    return out


@_dequantize.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype,
    packed: bool,
    kind: str,
    divide: bool,
    backend: str | None = None,
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * (2 if packed else 1)), dtype=dtype)

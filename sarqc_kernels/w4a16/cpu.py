"""W4A16 on a CPU: torch's int4 product for few tokens, tiles expanded in cache for many.

Few tokens (a decode step): `aten._weight_int4pack_mm_for_cpu` reads half a byte a weight, widens it to fp32 in
registers and multiplies there: about 0.56 bytes for each weight with groups of 64 and their bf16 grid, where a dense
bf16 product reads 2. Its time grows with every token, though, as it unpacks again for each few of them.

Many tokens (a prompt): a tile of the weight is expanded to fp32 once, [K, rows] so that rows stay innermost as they lie
in memory, and multiplied by all tokens: N K unpackings for 2 T N K flops. The product runs in fp32, which AVX-512
without AMX does faster than bf16 (measured: 1.5 to 2 times at 256 tokens); where AMX is there, in bf16.

Rounding. Weights stay (code - zero) * scale in fp32 (with AMX and many tokens: rounded once to bf16), sums are fp32,
the result is rounded to bf16 once, and again where a bias joins the few-token product. The one exception: few tokens
and asymmetric codes. There torch wants the offset (8 - zero) * scale in bf16, which needs up to 11 bits of 8: each
weight may be off by |8 - zero| * scale / 512, at most 1/64 of a step; of narrower codes, whose middle is less, by less.
Symmetric weights come back exactly.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor

from sarqc_kernels.w4a16.layout import INT4PACK, INT4PACK_ROWS, RepackedWeight, grid_of, int4pack_block, nibble_offset

__all__ = ["FEW", "unsupported", "w4a16_matmul"]

FEW = 64
"""Most tokens of an expert for which torch's int4 product is the faster way (measured: the lines cross near it)."""

_INT4_PRODUCT = torch.ops.aten._weight_int4pack_mm_for_cpu.default  # named whole: choosing it takes as long as a call

_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F

TILE = 1 << 20
"""Weights expanded at a time, 4 MiB of fp32 (measured: smaller tiles cost more in calls than they save in cache)."""


def unsupported(x: Tensor, weight: RepackedWeight, offsets: Tensor | None, bias: Tensor | None) -> str | None:
    """Why this implementation cannot take the call; None where it can."""
    if not x.is_cpu:
        return f"tensors are on {x.device.type}, not on the CPU"
    if weight.layout != INT4PACK:
        return f"the weight lies as {weight.layout!r}, not {INT4PACK!r} (2 to 4 bits, groups of 32 to 256, bf16 scales)"
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}: torch's int4 product is fast for torch.bfloat16 alone"
    return None if int4pack_block() else "torch packs int4 in an order that is not known here"


def w4a16_matmul(x: Tensor, weight: RepackedWeight, offsets: Tensor | None, bias: Tensor | None) -> Tensor:
    """See `sarqc_kernels.w4a16.w4a16_matmul`."""
    if offsets is None:
        return _expert(x, weight, 0, bias)
    out = x.new_zeros((x.shape[0], weight.out_features))
    for expert, (begin, end) in enumerate(pairwise(offsets.tolist())):
        if begin != end:
            out[begin:end] = _expert(x[begin:end], weight, expert, bias)
    return out


def _expert(x: Tensor, weight: RepackedWeight, expert: int, bias: Tensor | None) -> Tensor:
    if x.shape[0] > FEW:
        return _many(x, weight, expert, bias)
    out: Tensor = _INT4_PRODUCT(x.contiguous(), weight.words[expert], weight.group_size, weight.scales[expert])
    if out.shape[1] != weight.out_features:
        out = out[:, : weight.out_features].contiguous()
    return out if bias is None else out.add_(bias[expert])


@functools.cache
def _product_dtype() -> torch.dtype:
    """The dtype in which this CPU multiplies large matrices fastest."""
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


def _many(x: Tensor, weight: RepackedWeight, expert: int, bias: Tensor | None) -> Tensor:
    out = x.new_empty((x.shape[0], weight.out_features))
    wide = x.to(_product_dtype())
    scales, zeros = (None if part is None else part[expert].float() for part in grid_of(weight))
    assert scales is not None
    tall = max(1, TILE // (weight.in_features * INT4PACK_ROWS)) * INT4PACK_ROWS
    for row in range(0, weight.out_features, tall):
        rows = slice(row, min(row + tall, weight.out_features))
        tile = _expand(weight, expert, rows, scales[rows], None if zeros is None else zeros[rows]).to(wide.dtype)
        if bias is None:
            out[:, rows] = wide @ tile
        else:
            out[:, rows] = torch.addmm(bias[expert, rows].to(wide.dtype), wide, tile)
    return out


def _expand(weight: RepackedWeight, expert: int, rows: slice, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """fp32 [K, rows], the transpose of some rows of the weight; `rows` starts a block, scales and zeros are theirs."""
    half = (int4pack_block() or INT4PACK_ROWS) // 2
    words = weight.words[expert, rows.start : -(-rows.stop // INT4PACK_ROWS) * INT4PACK_ROWS]
    eights = words.view(-1, weight.in_features, half).view(torch.int64).transpose(0, 1)  # [K, blocks, half / 8]
    nibbles = torch.empty((weight.in_features, eights.shape[1], 2, half // 8), dtype=torch.int64)
    nibbles[:, :, 0] = eights
    nibbles[:, :, 1] = eights >> 4
    nibbles &= _LOW_NIBBLES  # eight codes to a 64-bit integer: bytes would take eight times the operations
    codes = nibbles.view(torch.uint8).view(scales.shape[1], weight.group_size, -1)[..., : rows.stop - rows.start]
    scale = scales.mT.unsqueeze(1)
    offset = scale * -8.0 if zeros is None else (zeros.mT.unsqueeze(1) + nibble_offset(weight.bits)) * -scale
    tile = codes.float()
    return torch.addcmul(offset, tile, scale, out=tile).flatten(0, 1)  # exact: bf16 scales times 4 bits have 12 bits

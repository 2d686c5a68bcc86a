"""`dequantize` in plain torch: the readable twin of every faster implementation, and what runs on a CPU.

A portion of rows at a time, so that the fp32 values in flight stay small beside the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["E2M1", "decoded_scales", "dequantize"]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of a four-bit float, by its lower three bits; the fourth is the sign."""

ELEMENTS = 1 << 22
"""Weights in flight."""


def dequantize(
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype,
    packed: bool,
    kind: str,
    divide: bool,
) -> Tensor:
    """Reference of the operation `sarqc::dequantize`.

    Args:
        codes: uint8 [B, N, K], or two to a byte [B, N, K / 2] where `packed`.
        scales: [B, R, C]: floating for kind "float", otherwise uint8.
        global_scale: fp32, one element, or None.
        block_rows: rows that share a scale.
        block_columns: columns that share a scale.
        dtype: of the result.
        packed: codes are e2m1, otherwise e4m3.
        kind: "float", "e8m0" or "e4m3": how scales are stored.
        divide: scales are divided by `global_scale`, otherwise multiplied.

    Returns:
        `dtype` [B, N, K].
    """
    batch, rows, width = codes.shape
    columns = width * (2 if packed else 1)
    out = torch.empty((batch, rows, columns), dtype=dtype, device=codes.device)
    factors = decoded_scales(scales, kind, global_scale, divide)
    tall = max(1, ELEMENTS // max(1, columns))
    for matrix in range(batch):
        for first in range(0, rows, tall):
            part = codes[matrix, first : first + tall]
            values = _e2m1(part) if packed else part.view(torch.float8_e4m3fn).float()
            block = torch.arange(first, first + len(part), device=codes.device).div(block_rows, rounding_mode="floor")
            _multiply(values, factors[matrix, block], block_columns)
            out[matrix, first : first + tall] = values
    return out


def decoded_scales(scales: Tensor, kind: str, global_scale: Tensor | None, divide: bool) -> Tensor:
    """The fp32 factors that scales stand for, combined with the second level."""
    if kind == "e8m0":
        # the bits of an fp32 power of two, but for 2^-127, which is subnormal; 255 is not a number and gives Inf
        bits = torch.where(scales == 0, 1 << 22, scales.to(torch.int32) << 23)
        factors = bits.view(torch.float32)
    else:
        factors = (scales.view(torch.float8_e4m3fn) if kind == "e4m3" else scales).float()
    if global_scale is None:
        return factors
    level = global_scale.reshape(1, 1, 1)
    return factors / level if divide else factors * level


def _e2m1(codes: Tensor) -> Tensor:
    """fp32 [n, 2 w] of bytes [n, w], the low nibble first."""
    nibbles = torch.arange(256, device=codes.device)
    signed = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float32, device=codes.device)
    pairs = torch.stack([signed[nibbles & 15], signed[nibbles >> 4]], dim=-1)  # of every byte
    return pairs.index_select(0, codes.flatten().int()).view(codes.shape[0], -1)


def _multiply(values: Tensor, factors: Tensor, block_columns: int) -> None:
    """values [n, K] *= factors [n, C] in place, each for `block_columns` columns; the last block may be smaller."""
    columns = values.shape[1]
    whole = columns // block_columns
    if whole:
        values[:, : whole * block_columns].unflatten(1, (whole, block_columns)).mul_(factors[:, :whole, None])
    if whole * block_columns < columns:
        values[:, whole * block_columns :].mul_(factors[:, whole:])

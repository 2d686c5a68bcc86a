"""A quantized weight in the one form everything inside agrees on: unsigned codes, scales, integer zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightInfo:
    """What a stored quantized weight is, before its codes are read.

    Attributes:
        shape: (N, K).
        dtype: Dtype of its scales.
        bits: Bits of a code.
        groups: Groups in a row, G.
        sym: Whether every zero is the middle code.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    bits: int
    groups: int
    sym: bool


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of E matrices of one shape; a dense layer is E = 1. The weight is (code - zero) * scale.

    Attributes:
        codes: uint8 [E, N, K], each in 0 .. 2^bits - 1.
        scales: Floating [E, N, G], in the dtype that is stored. Group g covers the K / G inputs from g * K / G on.
        zeros: uint8 [E, N, G].
        bits: Bits of a code, 2 to 8.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int

    @property
    def group_size(self) -> int:
        """Inputs per group, K / G."""
        return self.codes.shape[-1] // self.scales.shape[-1]

    @property
    def sym(self) -> bool:
        """Whether every zero is the middle code, so that zeros need not be stored."""
        return bool((self.zeros == 1 << (self.bits - 1)).all())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [E, N, K]; computed in fp32 and rounded once to `dtype`."""
        weight: Tensor = self.codes.unflatten(-1, (self.scales.shape[-1], self.group_size)).float()
        weight -= self.zeros.float().unsqueeze(-1)  # in place: what a copy of a large stack costs is its memory
        weight *= self.scales.float().unsqueeze(-1)
        return weight.flatten(-2).to(dtype)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on `device`."""
        return QuantizedWeight(self.codes.to(device), self.scales.to(device), self.zeros.to(device), self.bits)

    def split(self, rows: Sequence[int]) -> list[QuantizedWeight]:
        """The parts of a weight whose rows were concatenated: one for each entry of `rows`, which sum to N."""
        parts = zip(self.codes.split(list(rows), 1), self.scales.split(list(rows), 1), self.zeros.split(list(rows), 1))
        return [QuantizedWeight(*part, bits=self.bits) for part in parts]

    def rows(self, index: Tensor) -> QuantizedWeight:
        """The rows `index` (int64) of every matrix, in that order."""
        return QuantizedWeight(self.codes[:, index], self.scales[:, index], self.zeros[:, index], self.bits)

    def expert(self, index: int) -> QuantizedWeight:
        """Expert `index` alone, still with an expert axis of 1."""
        at = slice(index, index + 1)
        return QuantizedWeight(self.codes[at], self.scales[at], self.zeros[at], self.bits)

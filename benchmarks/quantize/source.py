"""A checkpoint that is not there: tensors of the right shapes, drawn when they are asked for.

Drawing billions of normal numbers would take longer than quantizing does, so one pool of them is drawn once and every
tensor is a stretch of it that begins where its name says: loading costs a copy, as reading from a page cache would.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from benchmarks.quantize.shapes import Shapes
from sarqc.errors import ModelError
from sarqc.method.weight import QuantizedWeight

POOL = 1 << 24


class RandomSource:
    """A `TensorSource` of bf16 tensors by name. Norms are ones, matrices normal with variance 1 / inputs.

    The same name and seed give the same numbers; nothing but the pool (32 MiB) is kept.
    """

    def __init__(self, shapes: Shapes, seed: int = 0) -> None:
        self._shapes = shapes
        self._pool = torch.randn(POOL, generator=torch.Generator().manual_seed(seed)).bfloat16()

    def names(self) -> list[str]:
        """All tensors."""
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        if name not in self._shapes:
            raise ModelError(f"tensor {name!r} is not in this source: it has {len(self._shapes)} others")
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """bf16, whichever it is."""
        return torch.bfloat16

    def load(self, name: str) -> Tensor:
        """Numbers for a tensor, on the CPU, in memory of its own."""
        shape = self.shape(name)
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        out = torch.empty(math.prod(shape), dtype=torch.bfloat16)
        begin, filled = zlib.crc32(name.encode()) % POOL, 0
        while filled < len(out):
            part = self._pool[begin : begin + len(out) - filled]
            out[filled : filled + len(part)] = part
            begin, filled = 0, filled + len(part)
        return out.mul_(shape[-1] ** -0.5).view(shape)

    def quantized(self, linear: str) -> QuantizedWeight | None:
        """Nothing is quantized."""
        return None

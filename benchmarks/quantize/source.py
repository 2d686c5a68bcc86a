"""A checkpoint that is not there: tensors of the right shapes, drawn when they are loaded.

Drawing billions of normal numbers would take longer than quantizing does, so one pool of them is drawn once and every
tensor is a stretch of it that begins where its name says: loading costs a copy, as reading from a page cache would.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.quantize.shapes import Shapes
from sarqc.config import QuantConfig
from sarqc.errors import ModelError
from sarqc.method.weight import QuantizedWeight

POOL = 1 << 24


class RandomSource:
    """A `TensorSource` of bf16 tensors by name. Norms are ones, matrices normal with variance 1 / inputs.

    device: where tensors are drawn. quant: the linear layers of the blocks, but for routers, have random codes too. The
    same name and seed give the same numbers; nothing but the pool (32 MiB, 16 more for codes) is kept.
    """

    def __init__(
        self, shapes: Shapes, seed: int = 0, *, device: torch.device | str = "cpu", quant: QuantConfig | None = None
    ) -> None:
        self._shapes, self._quant = shapes, quant
        generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(POOL, generator=generator).bfloat16().to(device)
        if quant is not None:
            octets = torch.randint(256, (POOL,), generator=generator, dtype=torch.uint8)
            self._octets = octets.to(device)

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
        """Numbers for a tensor, in memory of its own."""
        shape = self.shape(name)
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=self._pool.device)
        return _stretch(self._pool, name, shape).mul_(shape[-1] ** -0.5)

    def quantized(self, linear: str) -> QuantizedWeight | None:
        """Symmetric codes, all but the lowest alike likely, so that their mean is 0 as a model's is; scales around what
        gives a dense matrix's variance."""
        if self._quant is None or not linear.endswith("_proj"):
            return None
        bits, (rows, columns) = self._quant.bits, self.shape(f"{linear}.weight")
        grid = (1, rows, columns // self._quant.group_size)
        step = (12 / columns) ** 0.5 / (1 << bits)
        drawn = _stretch(self._octets, f"{linear}.scales", grid).float()
        return QuantizedWeight(
            codes=_stretch(self._octets, linear, (1, rows, columns)).remainder_((1 << bits) - 1).add_(1),
            scales=((0.5 + drawn / 255) * step).bfloat16(),
            zeros=torch.full(grid, 1 << (bits - 1), dtype=torch.uint8, device=self._octets.device),
            bits=bits,
        )


def _stretch(pool: Tensor, name: str, shape: Sequence[int]) -> Tensor:
    """A copy of the numbers of the pool from where the name says on, from its beginning again behind its end."""
    out = pool.new_empty(math.prod(shape))
    begin, filled = zlib.crc32(name.encode()) % POOL, 0
    while filled < len(out):
        part = pool[begin : begin + len(out) - filled]
        out[filled : filled + len(part)] = part
        begin, filled = 0, filled + len(part)
    return out.view(*shape)

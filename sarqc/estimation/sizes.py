"""How many bytes a run will take on disk, from shapes alone; exact up to headers. `memory` counts what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from sarqc.checkpoint.formats import NEUTRAL, Format
from sarqc.config import QuantConfig
from sarqc.estimation import shapes
from sarqc.method.weight import QuantizedWeight
from sarqc.pipeline.plan import Plan
from sarqc.pipeline.quantize_site import scale_dtype


@dataclass(frozen=True)
class Sizes:
    """Bytes. quantized: of the quantized Linears in the output. left: of all other tensors. neutral: of the quantized
    Linears in the format of finished blocks. hidden: of hidden states of all windows."""

    quantized: int
    left: int
    neutral: int
    hidden: int

    @property
    def output(self) -> int:
        """Bytes of the checkpoint's tensors."""
        return self.quantized + self.left

    @property
    def work(self) -> int:
        """Bytes of the work folder at most: the finished checkpoint, and hidden states beside those before them."""
        return self.neutral + self.left + 2 * self.hidden


def sizes(plan: Plan, windows: int, seqlen: int) -> Sizes:
    """Bytes on disk of a run over `windows` windows of `seqlen` tokens."""
    quantized = neutral = 0
    names = set(plan.source.names())
    kinds: dict[tuple[int, int, torch.dtype, bool], int] = {}
    for target in plan.targets.selected:
        names.discard(f"{target.linear}.weight")
        kind = (*target.shape, scale_dtype(plan.source, target.linear), target.embedding)
        kinds[kind] = kinds.get(kind, 0) + 1
    for (rows, columns, dtype, embedding), count in kinds.items():
        quant = plan.quant.of(embedding)
        quantized += count * _packed_bytes(plan.format, quant, rows, columns, dtype)
        neutral += count * _packed_bytes(NEUTRAL, quant, rows, columns, dtype)
    if plan.quant.avg_bits is not None:
        quantized = round(plan.quant.avg_bits * sum(prod(target.shape) for target in plan.targets.selected) / 8)
        neutral = quantized
    left = sum(shapes.stored_bytes(plan, name) for name in names)
    return Sizes(quantized, left, neutral, shapes.states_bytes(plan, windows, seqlen))


def bits_per_weight(plan: Plan, sizes: Sizes) -> float:
    """Bits on disk of each quantized weight, scales and zeros included."""
    return 8 * sizes.quantized / sum(prod(target.shape) for target in plan.targets.selected)


def _packed_bytes(format: Format, quant: QuantConfig, rows: int, columns: int, dtype: torch.dtype) -> int:
    """Bytes of one Linear in a format, by packing thin ones: they grow evenly with every 32 rows."""

    def packed(count: int) -> int:
        grid = torch.ones(1, count, quant.groups(columns), dtype=dtype)
        middle = torch.full(grid.shape, 1 << (quant.bits - 1), dtype=torch.uint8)
        codes = torch.zeros(1, count, columns, dtype=torch.uint8)
        tensors = format.pack("linear", QuantizedWeight(codes, grid, middle, quant.bits), quant)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    step = packed(64) - packed(32)
    fixed = packed(32) - step
    return fixed + rows // 32 * step + (packed(rows % 32) - fixed if rows % 32 else 0)

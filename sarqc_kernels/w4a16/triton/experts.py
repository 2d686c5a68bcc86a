"""The experts of a layer by Triton: launches of kernels of `kernels` and `reduce`; `experts` says of what.

Nothing waits for the device: grids are upper bounds of what any routing of the rows can need, and a program without
a tile returns at once.
"""

from __future__ import annotations

import triton
from torch import Tensor

from sarqc_kernels.device import FUSED, device_info, on_device
from sarqc_kernels.w4a16.config import choose
from sarqc_kernels.w4a16.layout import RepackedWeight
from sarqc_kernels.w4a16.routing import Routing
from sarqc_kernels.w4a16.triton.launch import SUM_COLUMNS, product, summed
from sarqc_kernels.w4a16.triton.reduce import combine_kernel

__all__ = ["combined", "w4a16_experts"]


def w4a16_experts(x: Tensor, gate_up: RepackedWeight, down: RepackedWeight, routing: Routing) -> Tensor:
    """See `sarqc_kernels.w4a16.experts`; takes weights that `launch.product` takes."""
    rows, experts, device = routing.tokens.shape[0], gate_up.words.shape[0], device_info(x.device)
    first = choose(rows, gate_up.out_features, gate_up.in_features, gate_up.group_size, experts, device, gate_up.bits)
    second = choose(rows, down.out_features, down.in_features, down.group_size, experts, device, down.bits)
    with on_device(x):
        parts = product(first, x.contiguous(), gate_up, routing.offsets, index=routing.tokens, gated=True, covered=True)
        hidden = summed(parts, gate_up, routing.offsets, x.dtype, gated=True)
        return combined(product(second, hidden, down, routing.offsets, covered=True), x, routing)


def combined(parts: Tensor, x: Tensor, routing: Routing) -> Tensor:
    """parts [splits, R, N] -> [T, N]: the sum over splits and the sum over a token's experts are one kernel."""
    splits, rows, outputs = parts.shape
    out = x.new_empty((x.shape[0], outputs))
    if rows:
        combine_kernel[(x.shape[0], triton.cdiv(outputs, SUM_COLUMNS))](
            parts, routing.slots.contiguous(), routing.weights.contiguous(), out, x.shape[0], rows, outputs, splits,
            CHOICES=routing.slots.shape[0], SIZE=SUM_COLUMNS, **FUSED,
        )  # fmt: skip
    return out

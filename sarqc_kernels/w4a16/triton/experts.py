"""The experts of a layer by Triton: launches of kernels of `kernels` and `reduce`; `experts` says of what.

Nothing waits for the device: grids are upper bounds of what any routing of so many rows can need, and a program without
a tile returns at once.
"""

from __future__ import annotations

import triton
from torch import Tensor

from sarqc_kernels.aot import ARCHS, AotJob
from sarqc_kernels.device import Device, device_info, on_device
from sarqc_kernels.w4a16.config import choose, configurations
from sarqc_kernels.w4a16.layout import RepackedWeight
from sarqc_kernels.w4a16.routing import Routing
from sarqc_kernels.w4a16.triton.launch import SUM_COLUMNS, product, product_job, sum_job, summed
from sarqc_kernels.w4a16.triton.reduce import combine_kernel

__all__ = ["aot_jobs", "combined", "w4a16_experts"]


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
            CHOICES=routing.slots.shape[0], SIZE=SUM_COLUMNS,
        )  # fmt: skip
    return out


def aot_jobs() -> list[AotJob]:
    """The gated product on every block that it can get, and the two sums."""
    jobs = []
    for arch in ARCHS:
        device = Device(arch, 132)
        for plan, groups in configurations(device):
            if plan.kernel != "expand" and groups <= 2:
                jobs.append(product_job(plan, arch, "bf16", groups, groups == 2, 128, gated=True))
        jobs.append(sum_job(arch, gated=True))
        jobs.append(_combine_job(arch))
    return jobs


def _combine_job(arch: int) -> AotJob:
    signature = {"parts": "*fp32", "slots": "*i64", "weights": "*bf16", "out": "*bf16"}
    sizes = dict.fromkeys(("tokens", "rows", "outputs", "splits"), "i32")
    constants = {"CHOICES": 8, "SIZE": SUM_COLUMNS}
    options = {"num_warps": 4, "num_stages": 1}
    return AotJob("w4a16 combine", combine_kernel, arch, signature | sizes, constants, options, tuple(signature))

"""W4A16 on a GPU by Triton: launches of the kernels of `kernels`, and what to compile where no GPU is at hand.

A call is one launch, or two where inputs are split or the weight is expanded for cuBLAS; it allocates its result (and
fp32 partial sums), asks the device nothing and, once its kernels are compiled (`warm_up`), can be captured in a CUDA
graph. Sums are added in an order that only the shape decides, so a call gives the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sarqc_kernels.device import FUSED, Device, device_info, interpreting, on_device
from sarqc_kernels.w4a16.config import (
    Plan,
    choose,
    groups_per_tile,
)
from sarqc_kernels.w4a16.layout import TILE_K, TILE_N, RepackedWeight
from sarqc_kernels.w4a16.triton.kernels import dot_kernel, expand_kernel
from sarqc_kernels.w4a16.triton.reduce import sum_kernel

__all__ = ["SUM_COLUMNS", "product", "summed", "w4a16_matmul"]

SUM_COLUMNS = 256  # of a program of `sum_kernel`


def w4a16_matmul(x: Tensor, weight: RepackedWeight, offsets: Tensor | None, bias: Tensor | None) -> Tensor:
    """See `sarqc_kernels.w4a16.w4a16_matmul`; takes what `config` and the layout `k_tiles` take."""
    experts = 0 if offsets is None else weight.words.shape[0]
    plan = choose(
        x.shape[0],
        weight.out_features,
        weight.in_features,
        weight.group_size,
        experts,
        device_info(x.device),
        weight.bits,
    )
    with on_device(x):
        return run(plan, x.contiguous(), weight, offsets, bias)


def run(plan: Plan, x: Tensor, weight: RepackedWeight, offsets: Tensor | None, bias: Tensor | None) -> Tensor:
    """The product by a given plan."""
    if plan.kernel == "expand":
        return _expanded(plan, x, weight, bias)
    return summed(product(plan, x, weight, offsets, bias), weight, offsets, x.dtype)


def product(
    plan: Plan,
    x: Tensor,
    weight: RepackedWeight,
    offsets: Tensor | None,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    gated: bool = False,
    covered: bool = False,
) -> Tensor:
    """Partial products [splits, rows, N] of a plan that is not "expand": in x's dtype where splits is 1, else fp32.

    index: int64 [rows], the row of x behind each row; None: x has them in order. gated: rows of the weight are gate and
    then up; the result is silu(gate) * up, N / 2 wide, where splits is 1, and still both, N wide, where it is not.
    covered: every row belongs to an expert, so that each is written; otherwise rows of none are zeroed first.
    """
    rows, split = x.shape[0] if index is None else index.shape[0], plan.splits > 1
    outputs = weight.out_features // 2 if gated else weight.out_features
    wide, dtype = (weight.out_features, torch.float32) if split else (outputs, x.dtype)
    # rows outside of all experts are zeroed here, or left out of the sum over splits
    make = x.new_empty if split or offsets is None or covered else x.new_zeros
    parts: Tensor = make((plan.splits, rows, wide), dtype=dtype)
    if rows == 0:
        return parts
    experts = 0 if offsets is None else weight.words.shape[0]
    groups = groups_per_tile(weight.group_size, weight.in_features)
    plan = plan.fitting(gated=gated, asymmetric=weight.zeros is not None, experts=experts, groups=groups)
    device = device_info(x.device)
    # each expert has at most one block that is not full, and none without a row
    blocks = triton.cdiv(rows, plan.tokens) if experts == 0 else rows // plan.tokens + min(experts, rows)
    k_tiles, padded = weight.words.shape[2], weight.words.shape[1] * TILE_N
    grid = (blocks, triton.cdiv(outputs, plan.block_n // 2 if gated else plan.block_n), plan.splits)
    if plan.resident:
        grid = (min(blocks * grid[1], plan.resident * device.multiprocessors), 1, 1)
    dot_kernel[grid](
        x, weight.words, weight.scales, _or(weight.zeros, weight.words), _or(offsets, weight.words),
        _or(index, weight.words), _or(bias, x), parts,
        M=rows, N=outputs, K=weight.in_features, k_tiles=k_tiles, groups=weight.scales.shape[1],
        tiles_per_group=_tiles_per_group(weight), padded=padded, tiles_per_split=triton.cdiv(k_tiles, plan.splits),
        BITS=weight.bits, EXPERTS=experts, SPAN=triton.next_power_of_2(max(2, experts)), SUB=groups,
        ASYMMETRIC=weight.zeros is not None, BIASED=bias is not None, SPLIT=split,
        WHOLE=weight.in_features % TILE_K == 0, INDEXED=index is not None, GATED=gated, BLOCK_M=plan.block_m,
        TAIL=plan.tail, BLOCK_N=plan.block_n, FOLDED=plan.folded, WAIT=plan.folded and device.operand_in_flight,
        PERSISTENT=plan.resident > 0, PDL=split and overlaps(device), **_options(plan), **FUSED,
    )  # fmt: skip
    return parts


def overlaps(device: Device) -> bool:
    """Whether the launch of a sum over splits may overlap with its product (programmatic dependent launch)."""
    return device.arch >= 90 and not interpreting()


def _options(plan: Plan) -> dict[str, Any]:
    """Arguments of the compiler beside the kernel."""
    own = {"maxnreg": plan.registers} if plan.registers else {}
    return {"num_warps": plan.warps, "num_stages": plan.stages, **own}


def summed(
    parts: Tensor, weight: RepackedWeight, offsets: Tensor | None, dtype: torch.dtype, gated: bool = False
) -> Tensor:
    """[rows, N] in `dtype` of what `product` made, with the same `gated`."""
    splits, rows = parts.shape[:2]
    if splits == 1:
        return parts[0]
    outputs = weight.out_features // 2 if gated else weight.out_features
    out = parts.new_empty((rows, outputs), dtype=dtype)
    experts = 0 if offsets is None else weight.words.shape[0]
    if rows:
        pdl = overlaps(device_info(parts.device))
        sum_kernel[(rows, triton.cdiv(outputs, SUM_COLUMNS))](
            parts, _or(offsets, weight.words), out, rows, outputs, splits, EXPERTS=experts, GATED=gated,
            SIZE=SUM_COLUMNS, PDL=pdl, launch_pdl=pdl, **FUSED,
        )  # fmt: skip
    return out


def _or(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """What a kernel reads as one piece. A pointer has to be passed; one that stands in for None is never read."""
    return instead if tensor is None else tensor.contiguous()


def _tiles_per_group(weight: RepackedWeight) -> int:
    """Tiles that share a scale; beyond the last one where a scale is for a whole row."""
    whole = weight.group_size == weight.in_features
    return weight.words.shape[2] if whole else max(1, weight.group_size // TILE_K)


def _expanded(plan: Plan, x: Tensor, weight: RepackedWeight, bias: Tensor | None) -> Tensor:
    """Dense: write the weight to memory for the time of this call, and let cuBLAS multiply."""
    matrix = x.new_empty((weight.out_features, weight.in_features))
    k_tiles, padded = weight.words.shape[2], weight.words.shape[1] * TILE_N
    expand_kernel[(k_tiles, padded // plan.block_n)](
        weight.words, weight.scales, _or(weight.zeros, weight.words), matrix, weight.out_features, weight.in_features,
        k_tiles, _tiles_per_group(weight), padded, BITS=weight.bits,
        SUB=groups_per_tile(weight.group_size, weight.in_features),
        ASYMMETRIC=weight.zeros is not None, BLOCK_N=plan.block_n, num_warps=plan.warps, **FUSED,
    )  # fmt: skip
    return x @ matrix.T if bias is None else torch.addmm(bias[0].to(x.dtype), x, matrix.T)

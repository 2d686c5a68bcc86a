"""W4A16 on a GPU by Triton: launches of the kernels of `kernels_impl`, and what to compile where no card is at hand.

A call is one launch, or two where inputs are split or the weight is expanded for cuBLAS; it allocates its result (and
fp32 partial sums), asks the device nothing and can be captured in a CUDA graph. Sums are added in an order that only
the shape decides, so a call gives the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sarqc_kernels.targets import ARCHS, AotJob, Card, card_of, interpreting
from sarqc_kernels.w4a16.config import Plan, choose, configurations, dot, groups_per_brick
from sarqc_kernels.w4a16.kernels_impl import dot_kernel, expand_kernel, gemv_kernel, sum_kernel
from sarqc_kernels.w4a16.layout import BRICK_ROWS, PreparedWeight

__all__ = ["aot_jobs", "w4a16_matmul"]

SUM_COLUMNS = 256  # of a program of `sum_kernel`


def w4a16_matmul(x: Tensor, weight: PreparedWeight, offsets: Tensor | None, bias: Tensor | None) -> Tensor:
    """See `sarqc_kernels.w4a16.w4a16_matmul`; takes what `config` and the layout `bricks` take."""
    experts = 0 if offsets is None else weight.words.shape[0]
    plan = choose(x.shape[0], weight.outputs, weight.inputs, weight.group_size, experts, card_of(x.device))
    return run(plan, x.contiguous(), weight, offsets, bias)


def run(plan: Plan, x: Tensor, weight: PreparedWeight, offsets: Tensor | None, bias: Tensor | None) -> Tensor:
    """The product by a given plan."""
    if plan.kernel == "expand":
        return _expanded(plan, x, weight, bias)
    tokens, outputs = x.shape[0], weight.outputs
    out = x.new_empty((tokens, outputs)) if offsets is None else x.new_zeros((tokens, outputs))
    if tokens == 0:
        return out
    parts = out if plan.splits == 1 else x.new_empty((plan.splits, tokens, outputs), dtype=torch.float32)
    experts = 0 if offsets is None else weight.words.shape[0]
    # each expert has at most one tile that is not full, and none without a row
    tiles = triton.cdiv(tokens, plan.tokens) if experts == 0 else tokens // plan.tokens + min(experts, tokens)
    bricks, padded = weight.words.shape[2], weight.words.shape[1] * BRICK_ROWS
    sub = groups_per_brick(weight.group_size, weight.inputs)
    per_group = bricks if weight.group_size == weight.inputs else max(1, weight.group_size // 128)
    kernel, more = (gemv_kernel, {"STAGES": plan.stages}) if plan.kernel == "gemv" else (dot_kernel, {})
    kernel[(tiles, triton.cdiv(outputs, plan.rows), plan.splits)](
        x, weight.words, weight.scales, _or(weight.zeros, weight.words), _or(offsets, weight.words), _or(bias, x),
        parts, tokens, outputs, weight.inputs, bricks, weight.scales.shape[1], per_group, padded,
        triton.cdiv(bricks, plan.splits),
        EXPERTS=experts, SPAN=triton.next_power_of_2(max(2, experts)), SUB=sub, ASYMMETRIC=weight.zeros is not None,
        BIASED=bias is not None, SPLIT=plan.splits > 1, WHOLE=weight.inputs % 128 == 0, TOKENS=plan.tokens,
        ROWS=plan.rows, INTERPRETED=interpreting(), num_warps=plan.warps, num_stages=plan.stages, **more,
    )  # fmt: skip
    if plan.splits > 1:
        grid = (tokens, triton.cdiv(outputs, SUM_COLUMNS))
        sum_kernel[grid](
            parts, _or(offsets, weight.words), out, tokens, outputs, plan.splits, EXPERTS=experts, SIZE=SUM_COLUMNS
        )
    return out


def _or(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """A pointer has to be passed; one that stands in for None is never read."""
    return instead if tensor is None else tensor


def _expanded(plan: Plan, x: Tensor, weight: PreparedWeight, bias: Tensor | None) -> Tensor:
    """Dense: write the weight to memory for the time of this call, and let cuBLAS multiply."""
    matrix = x.new_empty((weight.outputs, weight.inputs))
    bricks, padded = weight.words.shape[2], weight.words.shape[1] * BRICK_ROWS
    per_group = bricks if weight.group_size == weight.inputs else max(1, weight.group_size // 128)
    expand_kernel[(bricks, padded // plan.rows)](
        weight.words, weight.scales, _or(weight.zeros, weight.words), matrix, weight.outputs, weight.inputs, bricks,
        per_group, padded, SUB=groups_per_brick(weight.group_size, weight.inputs),
        ASYMMETRIC=weight.zeros is not None, ROWS=plan.rows, num_warps=plan.warps,
    )  # fmt: skip
    return x @ matrix.T if bias is None else torch.addmm(bias[0].to(x.dtype), x, matrix.T)


_KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def aot_jobs() -> list[AotJob]:
    """Every tile on every card; two groups to a brick stand for asymmetric codes and experts as well."""
    jobs = []
    for arch in ARCHS:
        card = Card(arch, 132)
        for plan, groups in configurations(card):
            experts = 128 if groups == 2 and plan.kernel != "expand" else 0
            jobs.append(_job(plan, arch, "bf16", groups, groups == 2, experts))
        jobs.append(_job(dot(64, 1, card), arch, "fp16", 1, True, 0))
        jobs.append(_job(dot(16, 1, card), arch, "bf16", 2, False, 0, whole=False))
        jobs.append(_sum_job(arch))
    return jobs


def _job(plan: Plan, arch: int, kind: str, sub: int, asymmetric: bool, experts: int, whole: bool = True) -> AotJob:
    grid = f"g{128 // sub}{'a' if asymmetric else 's'}"
    tile = f"{plan.kernel} {plan.tokens}x{plan.rows} split{plan.splits}{'' if whole else ' ragged'}"
    name = f"w4a16 {tile} {kind} {grid} e{experts}"
    signature = {"words": "*i32", "scales": "*bf16", "zeros": "*u8", "out": f"*{kind}"}
    sizes = ["outputs", "inputs", "bricks", "bricks_per_group", "padded"]
    constants: dict[str, Any] = {"SUB": sub, "ASYMMETRIC": asymmetric, "ROWS": plan.rows}
    if plan.kernel == "expand":
        kernel, divisible = expand_kernel, [*signature, "outputs", "inputs", "padded"]
    else:
        kernel = dot_kernel if plan.kernel == "dot" else gemv_kernel
        signature |= {"x": f"*{kind}", "offsets": "*i64", "bias": f"*{kind}"}
        signature["out"] = "*fp32" if plan.splits > 1 else signature["out"]
        divisible = [*signature, "outputs", "inputs", "padded"]
        sizes += ["tokens", "groups", "bricks_per_split"]
        constants |= {
            "EXPERTS": experts, "SPAN": max(2, experts), "BIASED": True, "SPLIT": plan.splits > 1, "WHOLE": whole,
            "TOKENS": plan.tokens, "INTERPRETED": False,
        }  # fmt: skip
        if plan.kernel == "gemv":
            constants["STAGES"] = plan.stages
    tensor_core = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]
    return AotJob(
        name, kernel, arch, signature | dict.fromkeys(sizes, "i32"), constants,
        {"num_warps": plan.warps, "num_stages": plan.stages}, divisible,
        (tensor_core,) if plan.kernel == "dot" else (),
    )  # fmt: skip


def _sum_job(arch: int) -> AotJob:
    signature = {"parts": "*fp32", "offsets": "*i64", "out": "*bf16"}
    sizes = {"tokens": "i32", "outputs": "i32", "splits": "i32"}
    constants = {"EXPERTS": 128, "SIZE": SUM_COLUMNS}
    options = {"num_warps": 4, "num_stages": 1}
    return AotJob("w4a16 sum", sum_kernel, arch, signature | sizes, constants, options, tuple(signature))

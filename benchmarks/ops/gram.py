"""Gram accumulation: X^T X of calibration rows, dense and by expert.

Least work of T rows and K inputs: the lower triangle, T K (K + 1) flops; x read once and the triangle read and written.
Rivals: what calibration tools do today (fp32 products), the same on TF32 tensor cores, and the best cuBLAS can do: a
bf16 product with an fp32 result, which has no triangle.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.base import Call, Contender, Inputs, Op, Point, no_interpreter, normal, on_gpu_only
from sarqc_kernels.device import triton_unsupported
from sarqc_kernels.gram import gram_accumulate_

TOKENS = 262_144  # 128 windows of 2048 tokens
SLOWEST = 10e12  # flops of a point beyond which fp32 products would take seconds


def points(quick: bool) -> list[Point]:
    if quick:
        return [_point(512, 96, 1, 0, "small"), _point(500, 64, 4, 0, "small, experts of unequal size")]
    return [
        _point(TOKENS, 4096, 1, 0, "q, k, v and gate, up of Llama-3-8B", 0.70),
        _point(TOKENS, 14336, 1, 0, "down of Llama-3-8B", 0.70),
        _point(2_097_152, 2048, 128, 0, "gate, up of Qwen3-30B-A3B: 128 experts, 2 M routed rows", 0.55),
        _point(TOKENS, 2048, 1, 1, "q, k, v of Qwen3-30B-A3B: few tiles, so rows are split", 0.60),
        _point(TOKENS, 8192, 1, 1, "attention of Llama-3-70B", 0.70),
        _point(2_097_152, 768, 128, 1, "down of Qwen3-30B-A3B: six tiles a side", 0.50),
        _point(8192, 4096, 1, 1, "one micro-batch of a run: 8192 rows, as `blocks.run` sends them"),
        _point(TOKENS, 768, 1, 2, "a small model: one tile in 132 processors without splits"),
        _point(65_536, 28672, 1, 2, "down of Llama-3-70B, a quarter of the rows", 0.70),
        _point(TOKENS, 4095, 1, 2, "odd width: no bulk copies"),
    ]


def _point(tokens: int, inputs: int, experts: int, rank: int, why: str, goal: float | None = None) -> Point:
    triangle = experts * inputs * (inputs + 1) // 2
    name = f"{f'{experts}e ' if experts > 1 else ''}{tokens} x {inputs}"
    sizes = {"tokens": tokens, "inputs": inputs, "experts": experts}
    return Point(name, why, sizes, tokens * inputs * (inputs + 1), 2 * tokens * inputs + 8 * triangle, rank, goal)


def make(point: Point, device: torch.device, generator: torch.Generator) -> Inputs:
    """bf16 rows, and offsets of experts of unequal size: shares fall off as routing does, by a factor of about 8."""
    tokens, inputs, experts = (point.sizes[name] for name in ("tokens", "inputs", "experts"))
    share = torch.linspace(1.0, 0.12, experts, dtype=torch.float64).cumsum(0)
    cuts = [0, *(share / share[-1] * tokens).round().long().tolist()]
    return {
        "x": normal(generator, tokens, inputs),
        "offsets": torch.tensor(cuts, device=device) if experts > 1 else None,
        "cuts": cuts,
    }


def sums(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Gram, rows and sums of |x| of a contender, which have seen nothing."""
    x, experts = inputs["x"], len(inputs["cuts"]) - 1
    count = x.shape[1]
    return (
        torch.zeros(experts, count, count, device=x.device),
        torch.zeros(experts, dtype=torch.int64, device=x.device),
        torch.zeros(experts, count, device=x.device),
    )


def _ours(backend: str) -> Contender:
    def bind(inputs: Inputs) -> Call:
        own = sums(inputs)

        def call() -> Tensor:
            gram_accumulate_(*own, inputs["x"], inputs["offsets"], backend=backend)
            return own[0]

        return call

    def unsupported(point: Point, device: torch.device) -> str | None:
        if backend == "triton":
            return no_interpreter(backend, device) or triton_unsupported(torch.empty(0, device=device))
        slow = device.type == "cuda" and point.flops > SLOWEST
        return "plain fp32 products would take seconds at this size" if slow else None

    return Contender(f"sarqc {backend}", True, unsupported, bind)


def _torch(name: str, dtype: torch.dtype, *, tf32: bool = False) -> Contender:
    """A product of each expert's rows in `dtype`, added to fp32 sums."""

    def bind(inputs: Inputs) -> Call:
        x, total = inputs["x"], sums(inputs)[0]
        stretches = [x[a:b] for a, b in pairwise(inputs["cuts"])]

        def call() -> Tensor:
            for expert, part in enumerate(stretches):
                if dtype == torch.float32:  # the conversion is part of what it costs
                    wide = part.float()
                    total[expert].addmm_(wide.T, wide)
                else:
                    total[expert] += torch.mm(part.T, part, out_dtype=torch.float32)
            return total

        if not tf32:
            return call

        def with_tf32() -> Tensor:  # torch's switch is read when a product is launched
            before = torch.backends.cuda.matmul.fp32_precision
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            try:
                return call()
            finally:
                torch.backends.cuda.matmul.fp32_precision = before

        return with_tf32

    def unsupported(point: Point, device: torch.device) -> str | None:
        if device.type != "cuda":
            return on_gpu_only(point, device) if dtype != torch.float32 or tf32 else None
        if dtype == torch.float32 and not tf32 and point.flops > SLOWEST:
            return "plain fp32 products would take seconds at this size"
        return None

    return Contender(name, False, unsupported, bind)


def error(inputs: Inputs, result: Any) -> float:
    """Relative error of a few rows of the last expert's triangle against float64; sums of the first call alone."""
    a, b = inputs["cuts"][-2:]
    x = inputs["x"][a:b]
    count = result.shape[-1]
    rows = sorted({count - 1, count // 2, min(7, count - 1)})
    exact = torch.zeros(len(rows), count, dtype=torch.float64, device=x.device)
    for part in x.split(65_536):
        exact += part[:, rows].double().T @ part.double()
    lower = torch.arange(count, device=x.device)[None, :] <= torch.tensor(rows, device=x.device)[:, None]
    off = (result[-1, rows].double() - exact)[lower].norm() / exact[lower].norm()
    return float(off)


OP = Op(
    name="gram",
    tests=("tests/kernels/test_gram.py", "tests/kernels/test_gram_triton.py"),
    points=points,
    inputs=make,
    contenders=(
        _ours("triton"),
        _ours("reference"),
        _torch("torch bf16, fp32 sums", torch.bfloat16),
        _torch("torch fp32, TF32 products", torch.float32, tf32=True),
        _torch("torch fp32 (what tools do)", torch.float32),
    ),
    error=error,
    most_error=1e-3,
    meaning="relative error of a sample of the triangle against float64",
)

"""Column quantization: from a damped Hessian to codes, factorisation included, as D.5's goals and the rivals count it.

Least work of N rows and K inputs for each of E experts: one Cholesky, K^3 / 3 flops, and the error feedback, N K^2;
the weight and the Hessian read and the codes written once. The feedback needs fp32 or three TF32 products, so a share
of the bf16 roof cannot reach 1; the points are compared with each other and with the goals in milliseconds instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.base import Call, Contender, Inputs, Op, Point, no_interpreter, normal
from benchmarks.rivals import gptq_eager, llmcompressor_fused
from sarqc_kernels import fit_grid, quantize_columns
from sarqc_kernels.backend import explain
from sarqc_kernels.columns import GridRule, Problem, implementations

GROUP, BITS = 128, 4
RULE: dict[str, Any] = {"bits": BITS, "sym": True, "search": False, "scale_dtype": torch.bfloat16}


def points(quick: bool) -> list[Point]:
    if quick:
        return [_point(1, 48, 256, 0, "small"), _point(3, 32, 128, 0, "small, experts")]
    return [
        _point(1, 4096, 4096, 0, "q or o of Llama-3-8B", 6.0),
        _point(1, 28672, 4096, 0, "gate and up of Llama-3-8B, one site"),
        _point(1, 4096, 14336, 0, "down of Llama-3-8B", 80.0),
        _point(128, 1536, 2048, 0, "gate and up of Qwen3-30B-A3B", 60.0),
        _point(128, 2048, 768, 1, "down of Qwen3-30B-A3B", 12.0),
        _point(1, 14336, 4096, 1, "gate alone of Llama-3-8B", 10.0),
        _point(1, 6144, 4096, 2, "q, k and v of Llama-3-8B, one site"),
        _point(1, 8192, 28672, 2, "down of Llama-3-70B"),
    ]


def _point(experts: int, rows: int, columns: int, rank: int, why: str, goal_ms: float | None = None) -> Point:
    name = f"{f'{experts}e ' if experts > 1 else ''}{rows} x {columns}"
    flops = experts * (columns**3 / 3 + rows * columns**2)
    traffic = experts * (5 * rows * columns + 4 * columns**2)
    sizes = {"experts": experts, "rows": rows, "columns": columns}
    goal_seconds = None if goal_ms is None else goal_ms / 1000
    return Point(name, why, sizes, flops, traffic, rank, goal_seconds=goal_seconds)


def make(point: Point, device: torch.device, generator: torch.Generator) -> Inputs:
    """A weight, a Hessian of correlated rows with a few large inputs, and its min-max grid."""
    experts, rows, columns = (point.sizes[name] for name in ("experts", "rows", "columns"))
    size = torch.rand(experts, 1, columns, generator=generator, device=device).mul_(3.0).exp_()
    hessian = torch.empty(experts, columns, columns, device=device)
    for expert in range(experts):
        x = normal(generator, 2 * columns, columns, dtype=torch.float32)
        x = (x + 0.7 * x.roll(1, -1)).mul_(size[expert])
        torch.mm(x.T, x, out=hessian[expert]).div_(2 * columns)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    diagonal += 0.01 * diagonal.mean(1, keepdim=True)
    weight = normal(generator, experts, rows, columns, dtype=torch.float32).mul_(0.02)
    scales, zeros = fit_grid(weight, None, group_size=GROUP, **RULE)
    return {"weight": weight, "hessian": hessian, "scales": scales, "zeros": zeros}


def factor(hessian: Tensor) -> Tensor:
    """M with hessian = M M^T, as `sarqc.method.hessian` takes it: one Cholesky of the flipped matrices."""
    lower, _ = torch.linalg.cholesky_ex(hessian.flip(-1, -2))
    upper: Tensor = lower.flip(-1, -2)
    return upper


def _solve(backend: str, inputs: Inputs, matrix: Tensor) -> Tensor:
    """Codes by one of ours, on the given grid, as the rivals have it."""
    codes, _, _ = quantize_columns(
        inputs["weight"], matrix, None, inputs["scales"], inputs["zeros"], group_size=GROUP, **RULE, backend=backend
    )
    return codes


def _ours(backend: str, part: str) -> Contender:
    def bind(inputs: Inputs) -> Call:
        if part == "whole":
            return lambda: _solve(backend, inputs, factor(inputs["hessian"]))
        known = factor(inputs["hessian"])
        return lambda: _solve(backend, inputs, known)

    def unsupported(point: Point, device: torch.device) -> str | None:
        if reason := no_interpreter(backend, device):
            return reason
        sizes = point.sizes
        weight = torch.empty(1, 1, sizes["columns"], device=device)  # what each implementation looks at
        problem = Problem(weight, weight, None, None, None, GROUP, GridRule(**RULE))
        known = dict(explain("quantize_columns", implementations()["quantize_columns"], (problem,)))
        slow = backend == "reference" and device.type == "cuda" and point.flops > 1e12
        return "a launch for each of its steps: seconds at this size" if slow else known[backend]

    return Contender(f"sarqc {backend}{'' if part == 'whole' else ', columns alone'}", True, unsupported, bind, part)


def _factor_alone(inputs: Inputs) -> Call:
    return lambda: factor(inputs["hessian"])


def _eager(inputs: Inputs) -> Call:
    def call() -> Tensor:
        every = (inputs[name] for name in ("weight", "hessian", "scales", "zeros"))
        return torch.stack([gptq_eager.quantize(*each, BITS) for each in zip(*every)])

    return call


def _eager_unsupported(point: Point, device: torch.device) -> str | None:
    launches = 10 * point.sizes["experts"] * point.sizes["columns"]
    return f"about {launches} launches: timed where they are fewer than 100000" if launches > 100_000 else None


def error(inputs: Inputs, result: Any) -> float:
    """The objective ||(W - Q) M||^2 of the codes over that of RTN: 1 is no gain, ours is well below."""
    weight, scales, zeros = (inputs[name][-1:] for name in ("weight", "scales", "zeros"))
    sample = torch.arange(0, weight.shape[1], max(1, weight.shape[1] // 64), device=weight.device)
    hessian = inputs["hessian"][-1].double()

    def objective(codes: Tensor) -> float:
        signed = codes.unflatten(-1, (scales.shape[-1], -1)).float() - zeros[0, sample].float()[..., None]
        off = weight[0, sample].double() - (signed * scales[0, sample].float()[..., None]).flatten(-2).double()
        return float(((off @ hessian) * off).sum())

    rounded = (weight[0, sample].unflatten(-1, (scales.shape[-1], -1)) / scales[0, sample].float()[..., None]).round()
    plain = (rounded + zeros[0, sample].float()[..., None]).clamp(0, (1 << BITS) - 1).flatten(-2)
    return objective(result[-1, sample]) / objective(plain)


OP = Op(
    name="columns",
    tests=(
        "tests/kernels/test_columns.py",
        "tests/kernels/test_columns_backends.py",
        "tests/kernels/test_grid_backends.py",
    ),
    points=points,
    inputs=make,
    contenders=(
        _ours("cuda", "whole"),
        _ours("triton", "whole"),
        _ours("cuda", "columns"),
        _ours("triton", "columns"),
        Contender("torch cholesky_ex alone", False, lambda *_: None, _factor_alone, "factor"),
        _ours("reference", "whole"),
        llmcompressor_fused.contender(GROUP, BITS),
        Contender("GPTQ loop, eager torch", False, _eager_unsupported, _eager),
    ),
    error=error,
    most_error=0.98,
    meaning="objective over that of RTN, on 64 rows of the last expert",
)

"""W4A16, dense: tokens times a packed weight; a few shapes of 2, 3, 6 and 8 bits as well.

Least work of M tokens, N outputs, K inputs of b bits in groups of g: b/8 bytes a weight, 2 bytes for each g of them,
activations and result once; 2 M N K flops. The rival that counts most is the same product with the weight in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.base import Call, Contender, Inputs, Op, Point, no_interpreter, normal, runs_anywhere
from benchmarks.rivals import packed_matmul
from sarqc_kernels import repack, w4a16_matmul
from sarqc_kernels.backend import explain
from sarqc_kernels.w4a16 import implementations
from sarqc_kernels.w4a16.layout import INT4PACK, STREAM, TILES

GROUP = 128
LAYOUT = {"triton": TILES, "cuda": TILES, "cpu": INT4PACK, "reference": STREAM}

SHAPES = (  # outputs, inputs, why, rank, goals by tokens
    (4096, 4096, "o of Llama-3-8B: smaller than the L2 cache", 1, {1: 0.40, 16: 0.40, 64: 0.50, 256: 0.55, 4096: 0.7}),
    (28672, 4096, "gate and up of Llama-3-8B, one weight", 1, {1: 0.65, 16: 0.65, 64: 0.5, 256: 0.55, 4096: 0.7}),
    (4096, 14336, "down of Llama-3-8B", 0, {1: 0.60, 16: 0.60, 64: 0.5, 256: 0.55, 4096: 0.7}),
    (8192, 8192, "the square that others publish", 0, {1: 0.60, 16: 0.60, 64: 0.5, 256: 0.55, 4096: 0.7}),
    (8192, 28672, "down of Llama-3-70B", 2, {1: 0.75, 16: 0.70, 64: 0.5, 256: 0.55, 4096: 0.7}),
    (6144, 4096, "q, k and v of Llama-3-8B, one weight", 3, {}),
)
TOKENS = ((1, 0), (16, 0), (64, 1), (256, 1), (4096, 0), (4, 3), (8, 3), (32, 3), (128, 3), (1024, 3))


OTHER_WIDTHS = (2, 3, 6, 8)
OTHER_TOKENS = (1, 16, 64, 4096)


def points(quick: bool) -> list[Point]:
    if quick:
        small = [_point(tokens, 192, 256, "small", 0, None) for tokens in (1, 16, 80)]
        return small + [_point(16, 192, 256, "small", 0, None, bits) for bits in OTHER_WIDTHS]
    four = [
        _point(tokens, outputs, inputs, why, rank + later, goals.get(tokens))
        for tokens, later in TOKENS
        for outputs, inputs, why, rank, goals in SHAPES
    ]
    outputs, inputs, why, *_ = SHAPES[1]
    return four + [_point(tokens, outputs, inputs, why, 2, None, b) for b in OTHER_WIDTHS for tokens in OTHER_TOKENS]


def _point(tokens: int, outputs: int, inputs: int, why: str, rank: int, goal: float | None, bits: int = 4) -> Point:
    weight = bits * outputs * inputs // 8 + 2 * outputs * inputs // GROUP
    traffic = weight + 2 * tokens * (inputs + outputs)
    sizes = {"tokens": tokens, "outputs": outputs, "inputs": inputs, "bits": bits}
    name = f"{tokens} x {outputs} x {inputs}" + (f" W{bits}" if bits != 4 else "")
    return Point(name, why, sizes, 2 * tokens * outputs * inputs, traffic, rank, goal)


def make(point: Point, device: torch.device, generator: torch.Generator) -> Inputs:
    """Symmetric codes with bf16 scales, the weight they stand for, and normal activations."""
    shape, bits = (1, point.sizes["outputs"], point.sizes["inputs"]), point.sizes["bits"]
    drawn = weight_of(shape, generator, device, bits)
    return drawn | {"x": normal(generator, point.sizes["tokens"], shape[2]), "bits": bits}


def weight_of(shape: tuple[int, int, int], generator: torch.Generator, device: torch.device, bits: int = 4) -> Inputs:
    """codes uint8 [E, N, K], scales bf16 [E, N, K / 128], and "weight", bf16 [N, K] of the last expert."""
    codes = torch.randint(0, 1 << bits, shape, generator=generator, device=device, dtype=torch.uint8)
    groups = shape[2] // GROUP
    scales = torch.rand((*shape[:2], groups), generator=generator, device=device).mul_(0.01).add_(0.01).bfloat16()
    return {"codes": codes, "scales": scales, "weight": dense(codes[-1], scales[-1], bits)}


def dense(codes: Tensor, scales: Tensor, bits: int = 4) -> Tensor:
    """bf16 [N, K]: (code - middle) * scale."""
    signed = codes.unflatten(-1, (scales.shape[-1], -1)).bfloat16() - (1 << (bits - 1))
    return (signed * scales.unsqueeze(-1)).flatten(-2)


def _ours(backend: str) -> Contender:
    def bind(inputs: Inputs) -> Call:
        x = inputs["x"]
        weight = repack(inputs["codes"], inputs["scales"], None, bits=inputs["bits"], dtype=x.dtype, device=x.device,
                         layout=LAYOUT[backend])  # fmt: skip
        return lambda: w4a16_matmul(x, weight, backend=backend)

    return Contender(f"sarqc {backend}", True, unsupported_reason(backend), bind)


def unsupported_reason(backend: str) -> Any:
    """`unsupported` of one of ours: asked of the implementation itself, about a small weight in its own layout."""

    def unsupported(point: Point, device: torch.device) -> str | None:
        if backend == "reference" and device.type == "cuda":
            return "unpacks in plain torch and waits for the device: timed on a CPU alone"
        if reason := no_interpreter(backend, device):
            return reason
        if backend == "cpu" and device.type != "cpu":
            return "runs on a CPU alone"
        bits = point.sizes.get("bits", 4)
        if backend == "cpu" and bits > 4:
            return f"torch's int4 product holds up to 4 bits, not {bits}"
        x = torch.zeros(min(17, point.sizes["tokens"]), GROUP, dtype=torch.bfloat16, device=device)
        codes = torch.zeros(1, 64, GROUP, dtype=torch.uint8, device=device)
        scales = torch.ones(1, 64, 1, dtype=torch.bfloat16, device=device)
        weight = repack(codes, scales, None, bits=bits, dtype=x.dtype, device=device, layout=LAYOUT[backend])
        return dict(explain("w4a16_matmul", implementations(x), (x, weight, None, None)))[backend]

    return unsupported


def _bf16(inputs: Inputs) -> Call:
    return lambda: torch.mm(inputs["x"], inputs["weight"].T)


def error(inputs: Inputs, result: Any) -> float:
    """Relative error of the first 64 tokens against float64, with the weight as the codes say."""
    exact = inputs["x"][:64].double() @ inputs["weight"].double().T
    return float((result[:64].double() - exact).norm() / exact.norm())


OP = Op(
    name="w4a16",
    tests=(
        "tests/kernels/test_w4a16.py",
        "tests/kernels/test_w4a16_config.py",
        "tests/kernels/test_w4a16_csrc.py",
        "tests/kernels/test_w4a16_persistent.py",
    ),
    points=points,
    inputs=make,
    contenders=(
        _ours("cuda"),
        _ours("triton"),
        _ours("cpu"),
        Contender("torch bf16", False, runs_anywhere, _bf16),
        packed_matmul.tinygemm(),
        packed_matmul.gemlite(),
        packed_matmul.humming(),
        _ours("reference"),
    ),
    error=error,
    most_error=2e-2,
    meaning="relative error of 64 tokens against float64",
)

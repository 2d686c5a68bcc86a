"""W4A16 by experts: the two products of an expert MLP over routed rows (gate and up in one, then down).

Rows come sorted by expert, as `sarqc.model.experts` hands them over; routing is uniform and the same on every run. An
expert that no token chose is not read, so the least traffic counts the experts that were hit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.base import Call, Contender, Inputs, Op, Point, normal, on_gpu_only
from benchmarks.ops.w4a16 import GROUP, LAYOUT, weight_of, why_not
from benchmarks.rivals import packed_matmul
from sarqc_kernels import prepare, w4a16_matmul

MODELS = (  # name, experts, chosen, hidden, intermediate, goals by tokens
    ("Qwen3-30B-A3B", 128, 8, 2048, 768, {1: 0.38, 16: 0.55, 64: 0.58, 4096: 0.57}),
    ("Mixtral-8x7B", 8, 2, 4096, 14336, {1: 0.56, 8: 0.68, 64: 0.57, 4096: 0.57}),
    ("DeepSeek-V3", 256, 8, 7168, 2048, {}),
)
TOKENS = ((1, 0), (16, 0), (64, 0), (4096, 1), (256, 2), (8, 2), (4, 2), (1024, 3))


def points(quick: bool) -> list[Point]:
    if quick:
        return [_point("small", 4, 2, 256, 128, tokens, 0, None) for tokens in (1, 24)]
    return [
        _point(model, experts, chosen, hidden, inner, tokens, rank + (2 if model == "DeepSeek-V3" else 0),
               goals.get(tokens))
        for tokens, rank in TOKENS
        for model, experts, chosen, hidden, inner, goals in MODELS
    ]  # fmt: skip


def routed(tokens: int, experts: int, chosen: int) -> Tensor:
    """int64 [experts]: rows of each expert when every token draws `chosen` different ones, all alike."""
    generator = torch.Generator().manual_seed(tokens)
    choice = torch.rand(tokens, experts, generator=generator).topk(chosen, -1).indices
    return torch.bincount(choice.flatten(), minlength=experts)


def _point(
    model: str, experts: int, chosen: int, hidden: int, inner: int, tokens: int, rank: int, goal: float | None
) -> Point:
    hit, rows = int((routed(tokens, experts, chosen) > 0).sum()), tokens * chosen
    weights = 3 * hidden * inner
    traffic = hit * (weights // 2 + 2 * weights // GROUP) + 2 * rows * (2 * hidden + 3 * inner)
    sizes = {"tokens": tokens, "experts": experts, "chosen": chosen, "hidden": hidden, "inner": inner}
    why = f"{model}: {hit} of {experts} experts are hit"
    return Point(f"{model} {tokens}", why, sizes, 2 * rows * weights, traffic, rank, goal)


def make(point: Point, device: torch.device, generator: torch.Generator) -> Inputs:
    """Both weights of every expert, routed rows for the first product and others for the second."""
    tokens, experts, chosen, hidden, inner = (
        point.sizes[n] for n in ("tokens", "experts", "chosen", "hidden", "inner")
    )
    counts = routed(tokens, experts, chosen)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    up = weight_of((experts, 2 * inner, hidden), generator, device)
    down = weight_of((experts, hidden, inner), generator, device)
    return {
        **{f"up_{name}": value for name, value in up.items()},
        **{f"down_{name}": value for name, value in down.items()},
        "x": normal(generator, tokens * chosen, hidden),
        "h": normal(generator, tokens * chosen, inner),
        "offsets": offsets.to(device),
        "last": int(counts.nonzero().max()),
    }


def _ours(backend: str) -> Contender:
    def bind(inputs: Inputs) -> Call:
        x, h, offsets = (inputs[name] for name in ("x", "h", "offsets"))
        up, down = (
            prepare(inputs[f"{side}_codes"], inputs[f"{side}_scales"], None, bits=4, dtype=x.dtype, device=x.device,
                    layout=LAYOUT[backend])
            for side in ("up", "down")
        )  # fmt: skip

        def call() -> tuple[Tensor, Tensor]:
            first = w4a16_matmul(x, up, offsets, backend=backend)
            return first, w4a16_matmul(h, down, offsets, backend=backend)

        return call

    return Contender(f"sarqc {backend}", True, why_not(backend), bind)


def _dense(inputs: Inputs, side: str) -> Tensor:
    """bf16 [E, K, N]: every expert's weight, transposed as grouped products want it."""
    codes, scales = inputs[f"{side}_codes"], inputs[f"{side}_scales"]
    signed = codes.unflatten(-1, (scales.shape[-1], -1)).bfloat16() - 8
    return (signed * scales.unsqueeze(-1)).flatten(-2).mT


def _grouped(inputs: Inputs) -> Call:
    x, h, ends = inputs["x"], inputs["h"], inputs["offsets"][1:].int()
    up, down = _dense(inputs, "up"), _dense(inputs, "down")
    return lambda: (torch._grouped_mm(x, up, offs=ends), torch._grouped_mm(h, down, offs=ends))


def _grouped_unsupported(point: Point, device: torch.device) -> str | None:
    if not hasattr(torch, "_grouped_mm"):
        return f"torch {torch.__version__} has no grouped product"
    bytes_needed = 6 * point.sizes["experts"] * point.sizes["hidden"] * point.sizes["inner"]
    return on_gpu_only(point, device) or ("its bf16 weights take over 10 GB" if bytes_needed > 10e9 else None)


def error(inputs: Inputs, result: Any) -> float:
    """Relative error of both products of the last expert that has rows, against float64."""
    last = inputs["last"]
    begin, end = inputs["offsets"][last : last + 2].tolist()
    end = min(end, begin + 64)
    off = size = 0.0
    for side, source, found in (("up", "x", result[0]), ("down", "h", result[1])):
        codes, scales = inputs[f"{side}_codes"][last], inputs[f"{side}_scales"][last]
        weight = (codes.unflatten(-1, (scales.shape[-1], -1)).double() - 8) * scales.double().unsqueeze(-1)
        exact = inputs[source][begin:end].double() @ weight.flatten(-2).T
        off += float((found[begin:end].double() - exact).square().sum())
        size += float(exact.square().sum())
    return (off / size) ** 0.5


OP = Op(
    name="moe",
    tests=("tests/kernels/test_w4a16.py", "tests/kernels/test_w4a16_experts.py"),
    points=points,
    inputs=make,
    contenders=(
        _ours("triton"),
        _ours("cpu"),
        Contender("torch grouped bf16", False, _grouped_unsupported, _grouped),
        packed_matmul.humming_experts(),
        _ours("reference"),
    ),
    error=error,
    most_error=2e-2,
    meaning="relative error of an expert's products against float64",
)

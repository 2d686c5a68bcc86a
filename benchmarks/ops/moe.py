"""W4A16 by experts: the two products of an expert MLP over routed rows (gate and up in one, then down).

Rows come sorted by expert, as `sarqc.model.moe` hands them over; routing is uniform and the same on every run. An
expert that no token chose is not read, so the least traffic counts the experts that were hit. The contenders called
"experts" do the whole layer, as a model calls it: the routing, the rows' tokens by index, the gate between the products
and the sum over each token's experts as well, for the same least work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.ops.base import Call, Contender, Inputs, Op, Point, normal, on_gpu_only
from benchmarks.ops.w4a16 import GROUP, LAYOUT, unsupported_reason, weight_of
from sarqc_kernels import RepackedWeight, repack, w4a16_matmul
from sarqc_kernels.w4a16 import route, w4a16_experts
from sarqc_kernels.w4a16.gemv import MOST_GROUPED_ROWS

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


def choices(tokens: int, experts: int, chosen: int) -> Tensor:
    """int64 [tokens, chosen]: every token draws `chosen` different experts, all alike."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, experts, generator=generator).topk(chosen, -1).indices


def routed(tokens: int, experts: int, chosen: int) -> Tensor:
    """int64 [experts]: rows of each expert."""
    return torch.bincount(choices(tokens, experts, chosen).flatten(), minlength=experts)


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
    choice, counts = choices(tokens, experts, chosen).to(device), routed(tokens, experts, chosen)
    share = torch.rand(tokens, chosen, generator=generator, device=device).softmax(-1).bfloat16()
    rows = route(choice, share, experts)
    x = normal(generator, tokens, hidden)
    up = weight_of((experts, 2 * inner, hidden), generator, device)
    down = weight_of((experts, hidden, inner), generator, device)
    return {
        **{f"up_{name}": value for name, value in up.items()},
        **{f"down_{name}": value for name, value in down.items()},
        "tokens": x,
        "x": x[rows.tokens],
        "h": normal(generator, tokens * chosen, inner),
        "offsets": rows.offsets,
        "choice": choice,
        "share": share,
        "last": int(counts.nonzero().max()),
    }


def _prepared(inputs: Inputs, backend: str) -> tuple[RepackedWeight, RepackedWeight]:
    x = inputs["x"]
    up, down = (
        repack(inputs[f"{side}_codes"], inputs[f"{side}_scales"], None, bits=4, dtype=x.dtype, device=x.device,
                layout=LAYOUT[backend])
        for side in ("up", "down")
    )  # fmt: skip
    return up, down


def _few_enough(backend: str) -> Callable[[Point, torch.device], str | None]:
    """`unsupported_reason`, and of csrc/gemv.cu whether it takes the rows."""

    def unsupported(point: Point, device: torch.device) -> str | None:
        rows, most = point.sizes["tokens"] * point.sizes["chosen"], min(MOST_GROUPED_ROWS, 8 * point.sizes["experts"])
        if backend == "cuda" and rows > most:
            return f"{rows} rows, it takes up to {most}"
        reason: str | None = unsupported_reason(backend)(point, device)
        return reason

    return unsupported


def _ours(backend: str) -> Contender:
    def bind(inputs: Inputs) -> Call:
        x, h, offsets = (inputs[name] for name in ("x", "h", "offsets"))
        up, down = _prepared(inputs, backend)

        def call() -> tuple[Tensor, Tensor]:
            first = w4a16_matmul(x, up, offsets, backend=backend)
            return first, w4a16_matmul(h, down, offsets, backend=backend)

        return call

    return Contender(f"sarqc {backend}", True, _few_enough(backend), bind)


def _layer(backend: str) -> Contender:
    def bind(inputs: Inputs) -> Call:
        weights = _prepared(inputs, backend)
        x, choice, share, experts = inputs["tokens"], inputs["choice"], inputs["share"], len(inputs["offsets"]) - 1
        router = "triton" if backend == "cuda" else backend if backend == "triton" else "reference"

        def call() -> Tensor:
            return w4a16_experts(x, *weights, route(choice, share, experts, backend=router), backend=backend)

        return call

    return Contender(f"sarqc experts {backend}", True, _few_enough(backend), bind)


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
    """Relative error against float64: of both products of the last expert with rows, or of two tokens of the layer."""
    pairs = _of_layer(inputs, result) if isinstance(result, Tensor) else _of_products(inputs, *result)
    off = size = 0.0
    for actual, exact in pairs:
        off += float((actual.double() - exact).square().sum())
        size += float(exact.square().sum())
    return (off / size) ** 0.5


def _of_products(inputs: Inputs, first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    last = inputs["last"]
    begin, end = inputs["offsets"][last : last + 2].tolist()
    rows = slice(begin, min(end, begin + 64))
    for side, source, result in (("up", "x", first), ("down", "h", second)):
        yield result[rows], inputs[source][rows].double() @ _exact(inputs, side, last).T


def _of_layer(inputs: Inputs, result: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for token in {0, len(result) - 1}:
        exact = torch.zeros_like(result[token], dtype=torch.float64)
        for expert, share in zip(inputs["choice"][token].tolist(), inputs["share"][token].tolist()):
            gate, up = (_exact(inputs, "up", expert) @ inputs["tokens"][token].double()).chunk(2)
            exact += share * (_exact(inputs, "down", expert) @ (silu(gate) * up))
        yield result[token], exact


def _exact(inputs: Inputs, side: str, expert: int) -> Tensor:
    """float64 [N, K]."""
    codes, scales = inputs[f"{side}_codes"][expert], inputs[f"{side}_scales"][expert]
    return ((codes.unflatten(-1, (scales.shape[-1], -1)).double() - 8) * scales.double().unsqueeze(-1)).flatten(-2)


OP = Op(
    name="moe",
    tests=(
        "tests/kernels/test_w4a16.py",
        "tests/kernels/test_w4a16_experts.py",
        "tests/kernels/test_w4a16_routing.py",
        "tests/kernels/test_w4a16_persistent.py",
    ),
    points=points,
    inputs=make,
    contenders=(
        _ours("cuda"),
        _layer("cuda"),
        _ours("triton"),
        _layer("triton"),
        _ours("cpu"),
        _layer("cpu"),
        Contender("torch grouped bf16", False, _grouped_unsupported, _grouped),
        _ours("reference"),
    ),
    error=error,
    most_error=2e-2,
    meaning="relative error of an expert's products, or of two tokens of the layer, against float64",
)

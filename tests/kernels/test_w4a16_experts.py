"""The experts of a layer on packed weights, each implementation: float64, ragged routings, order of sums, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sarqc_kernels import ArgumentError, BackendError
from sarqc_kernels.testing import Quantized, dequantize, poisoned_empty, random_quantized, relative_error
from sarqc_kernels.w4a16 import RepackedWeight, Routing, repack, w4a16_experts

BACKENDS = ("reference", "cpu", "triton")
LAYOUT = {"reference": "stream", "cpu": "int4pack", "triton": "tiles"}


def routed(chosen: Tensor, weights: Tensor, experts: int) -> Routing:
    """The routing of choices [T, k], rows of an expert in the order of tokens; written out slowly."""
    rows = sorted((int(e), t, c) for t, row in enumerate(chosen) for c, e in enumerate(row))
    places = {(t, c): place for place, (_, t, c) in enumerate(rows)}
    counts = [sum(e < bound for e, _, _ in rows) for bound in range(experts + 1)]
    slots = [sorted(places[t, c] for c in range(chosen.shape[1])) for t in range(len(chosen))]
    return Routing(
        torch.tensor(counts),
        torch.tensor([t for _, t, _ in rows], dtype=torch.int64),
        torch.tensor(slots, dtype=torch.int64).reshape(len(chosen), chosen.shape[1]).T.contiguous(),
        torch.stack([weights[t, c] for _, t, c in rows]) if rows else weights.flatten(),
    )


def random_routing(generator: torch.Generator, tokens: int, choices: int, experts: int, dtype: torch.dtype) -> Routing:
    """Random distinct experts for each token; the last expert gets none."""
    chosen = torch.rand(tokens, experts - 1, generator=generator).argsort(-1)[:, :choices]
    return routed(chosen, torch.rand(tokens, choices, generator=generator).to(dtype), experts)


OUTPUTS = 40
"""Of the second product: need not be the inputs of the first, and few keep the interpreter quick."""


def layer(generator: torch.Generator, experts: int, hidden: int, inner: int, groups: int, sym: bool) -> list[Quantized]:
    shapes = [(experts, 2 * inner, hidden), (experts, OUTPUTS, inner)]
    sizes = [groups, max(1, inner * groups // hidden)]
    return [
        random_quantized(generator, shape, count, 4, sym=sym, scale_dtype=torch.bfloat16)
        for shape, count in zip(shapes, sizes)
    ]


def prepared(weights: list[Quantized], backend: str, device: str, sym: bool) -> list[RepackedWeight]:
    if backend == "cpu" and device != "cpu":
        pytest.skip("the CPU's own tests run where the kernel tests are on the CPU")
    return [
        repack(w.codes, w.scales, None if sym else w.zeros, bits=4, device=device, layout=LAYOUT[backend])
        for w in weights
    ]


def exact(x: Tensor, weights: list[Quantized], routing: Routing, dtype: torch.dtype) -> Tensor:
    """The layer in `dtype`, every step rounded to it, one row after another."""
    first, second = (dequantize(weight).to(dtype) for weight in weights)
    out = torch.zeros(len(x), second.shape[1], dtype=dtype)
    for expert in range(len(first)):
        for row in range(int(routing.offsets[expert]), int(routing.offsets[expert + 1])):
            token = int(routing.tokens[row])
            gate, up = (first[expert] @ x[token].to(dtype)).chunk(2)
            hidden = torch.nn.functional.silu(gate) * up
            out[token] += (second[expert] @ hidden) * routing.weights[row].to(dtype)
    return out


CASES = [
    # experts, hidden, inner, groups, tokens, choices, sym: gemv, dot, splits, odd and broken sizes
    (3, 128, 32, 4, 3, 2, True),
    (4, 128, 64, 2, 9, 2, False),
    (3, 1024, 24, 8, 3, 1, True),
    (5, 192, 96, 6, 21, 3, False),
    (2, 128, 512, 1, 9, 1, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_step_by_step_in_the_same_dtype(
    case: tuple, dtype: torch.dtype, backend: str, device: str, generator: torch.Generator
) -> None:
    experts, hidden, inner, groups, tokens, choices, sym = case
    if backend == "cpu" and (dtype != torch.bfloat16 or inner % 32 or groups == 1):
        pytest.skip("torch's int4 product takes bf16 and groups of 32 to 256")
    weights = layer(generator, experts, hidden, inner, groups, sym)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    routing = random_routing(generator, tokens, choices, experts, dtype)
    on_device = Routing(*(part.to(device) for part in routing))
    ready = prepared(weights, backend, device, sym)
    with poisoned_empty():
        out = w4a16_experts(x.to(device), *ready, on_device, backend=backend)
    assert out.shape == (tokens, OUTPUTS) and out.dtype == dtype
    truth = exact(x, weights, routing, torch.float64)
    # torch rounds the weights too, and more often; 1.5 for the luck of the draw. The CPU's asymmetric product rounds
    # (8 - zero) * scale, up to eight times a weight, to bf16.
    worse = 4.0 if backend == "cpu" and not sym else 1.5
    assert relative_error(out.cpu(), truth) <= worse * relative_error(exact(x, weights, routing, dtype), truth)
    assert torch.equal(out, w4a16_experts(x.to(device), *ready, on_device, backend=backend))


def test_a_token_alone_gives_the_same_bits(backend: str, device: str, generator: torch.Generator) -> None:
    """Sums do not depend on who else is there, as long as the plan is the same."""
    if backend == "reference" and device == "cuda":
        pytest.skip("cuBLAS picks its kernels, and so the order of sums, by the number of rows")
    weights = layer(generator, 3, 128, 64, 2, True)
    ready = prepared(weights, backend, device, True)
    x = torch.randn(2, 128, generator=generator).bfloat16()
    chosen, scale = torch.tensor([[0, 1], [1, 0]]), torch.rand(2, 2, generator=generator).bfloat16()
    both = w4a16_experts(
        x.to(device), *ready, Routing(*(p.to(device) for p in routed(chosen, scale, 3))), backend=backend
    )
    for t in range(2):
        one = Routing(*(p.to(device) for p in routed(chosen[t : t + 1], scale[t : t + 1], 3)))
        assert torch.equal(both[t : t + 1], w4a16_experts(x[t : t + 1].to(device), *ready, one, backend=backend))


def test_the_order_of_slots_is_the_order_of_sums(backend: str, device: str) -> None:
    """Router weights 1, 2^30 and -2^30 in fp32: the 1 survives only where it is added last."""
    scales, codes = torch.ones(3, 64, 1, dtype=torch.bfloat16), torch.full((3, 64, 32), 8, dtype=torch.uint8)
    codes[:, :, 0] = 9  # every gate and every up is x_0
    second = torch.full((3, 64, 32), 8, dtype=torch.uint8)
    second[:, :, 0] = 9
    ready = prepared([Quantized(codes, scales, scales), Quantized(second, scales, scales)], backend, device, True)
    x = torch.full((1, 32), 1.0, dtype=torch.bfloat16)
    weights = torch.tensor([1.0, 2.0**30, -(2.0**30)])
    unit = float(torch.nn.functional.silu(torch.tensor(1.0)).bfloat16())
    for order, expected in (([0, 1, 2], 0.0), ([1, 2, 0], unit)):
        slots = torch.tensor(order).view(3, 1)
        routing = Routing(torch.tensor([0, 1, 2, 3]), torch.zeros(3, dtype=torch.int64), slots, weights)
        out = w4a16_experts(x.to(device), *ready, Routing(*(p.to(device) for p in routing)), backend=backend)
        assert out.float().cpu().unique().tolist() == [expected]


def test_nothing_is_zeroed_that_is_written_anyway(device: str, generator: torch.Generator) -> None:
    """Every row of a routing belongs to an expert, so no output needs to be filled first."""
    launcher = pytest.importorskip("sarqc_kernels.w4a16.triton.experts")
    ready = prepared(layer(generator, 3, 128, 64, 2, True), "triton", device, True)
    routing = random_routing(generator, 20, 2, 3, torch.bfloat16)
    x = torch.randn(20, 128, generator=generator).bfloat16().to(device)
    with Filled() as launch_arguments:
        launcher.w4a16_experts(x, *ready, Routing(*(part.to(device) for part in routing)))
    assert launch_arguments.names == []


class Filled(TorchDispatchMode):
    """Names of operations that fill a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in ("zero", "fill", "full")):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_no_token_at_all(backend: str, device: str, generator: torch.Generator) -> None:
    ready = prepared(layer(generator, 3, 128, 64, 2, True), backend, device, True)
    routing = random_routing(generator, 0, 2, 3, torch.bfloat16)
    x = torch.zeros(0, 128, dtype=torch.bfloat16, device=device)
    out = w4a16_experts(x, *ready, Routing(*(p.to(device) for p in routing)), backend=backend)
    assert out.shape == (0, OUTPUTS)


def test_refuses_what_does_not_fit(generator: torch.Generator) -> None:
    weights = layer(generator, 3, 64, 32, 2, True)
    first, second = prepared(weights, "reference", "cpu", True)
    x = torch.zeros(4, 64)
    routing = random_routing(generator, 4, 2, 3, torch.float32)
    w4a16_experts(x, first, second, routing)
    for args, words in (
        ((x[:, :60], first, second, routing), r"x is torch.float32 \[4, 60\]"),
        ((x, first, first, routing), "pass .E, 2 I, H. and"),
        ((x[:3], first, second, routing), "for 3 tokens"),
        ((x, first, second, routing._replace(weights=routing.weights[:3])), r"weights \[3\]"),
        ((x, first, second, routing._replace(offsets=routing.offsets[:2])), "offsets"),
        ((x, first, second, routing._replace(slots=routing.slots.to("meta"))), "slots is on meta"),
    ):
        with pytest.raises(ArgumentError, match=words):
            w4a16_experts(*args)
    with pytest.raises(BackendError, match="lies as 'stream'"):
        w4a16_experts(x.bfloat16(), first, second, routing, backend="cpu")


def test_opcheck(generator: torch.Generator) -> None:
    first, second = prepared(layer(generator, 3, 64, 32, 2, False), "reference", "cpu", False)
    routing = random_routing(generator, 5, 2, 3, torch.float32)
    args = (torch.randn(5, 64, generator=generator), *first, *second, *routing)
    torch.library.opcheck(torch.ops.sarqc.w4a16_experts.default, args)

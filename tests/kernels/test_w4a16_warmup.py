"""First calls made before they count: each shape once for each number of tokens, layers of experts as such."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sarqc_kernels import ArgumentError, warm_up
from sarqc_kernels.testing import random_quantized
from sarqc_kernels.w4a16 import RepackedWeight, repack, warmup


def weight(shape: tuple[int, int, int], bits: int = 4) -> RepackedWeight:
    drawn = random_quantized(torch.Generator().manual_seed(0), shape, 1, bits, scale_dtype=torch.bfloat16)
    return repack(drawn.codes, drawn.scales, None, bits=bits)


class Holder(nn.Module):
    def __init__(self, held: RepackedWeight) -> None:
        super().__init__()
        self.held = held

    def prepared(self) -> RepackedWeight:
        return self.held


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is run: (rows of x, outputs) of a product, (tokens, rows, outputs) of a layer."""
    seen: list[tuple[Any, ...]] = []
    product, experts = warmup.w4a16_matmul, warmup.w4a16_experts

    def multiply(x: torch.Tensor, held: RepackedWeight, offsets: torch.Tensor | None) -> torch.Tensor:
        seen.append((len(x), held.out_features))
        return product(x, held, offsets)

    def layer(x: torch.Tensor, gate_up: RepackedWeight, down: RepackedWeight, routing: Any) -> torch.Tensor:
        seen.append((len(x), len(routing.tokens), down.out_features))
        return experts(x, gate_up, down, routing)

    monkeypatch.setattr(warmup, "w4a16_matmul", multiply)
    monkeypatch.setattr(warmup, "w4a16_experts", layer)
    return seen


def test_each_shape_once_for_each_number_of_tokens(calls: list[tuple[Any, ...]]) -> None:
    model = nn.Sequential(Holder(weight((1, 40, 64))), nn.Linear(3, 3), Holder(weight((1, 40, 64))),
                          Holder(weight((1, 24, 64))))  # fmt: skip
    assert warm_up(model, tokens=(1, 5)) == 4
    assert calls == [(1, 40), (1, 24), (5, 40), (5, 24)]
    assert warm_up([weight((1, 40, 64)), weight((1, 40, 64), 3)], tokens=(2,)) == 2
    assert warm_up(weight((1, 40, 64)), tokens=(2,)) == 1


def test_a_layer_of_experts_runs_as_one(calls: list[tuple[Any, ...]]) -> None:
    gate_up, down = weight((3, 64, 32)), weight((3, 40, 32))
    assert warm_up([gate_up, down], tokens=(4,), top_k=2) == 3
    assert calls == [(8, 64), (8, 40), (4, 8, 40)]


def test_says_what_is_missing() -> None:
    with pytest.raises(ArgumentError, match="tokens"):
        warm_up(weight((1, 40, 64)), tokens=(0,))
    with pytest.raises(ArgumentError, match="weights"):
        warm_up(nn.Linear(2, 2))

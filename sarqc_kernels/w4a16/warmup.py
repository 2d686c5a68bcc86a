"""First calls, made before they count: a later call compiles nothing and builds nothing.

The first call of a shape compiles Triton kernels and, where nvcc is at hand, builds csrc/. Neither may happen while a
CUDA graph is captured, and neither should happen while a server answers. `warm_up` makes those calls on zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sarqc_kernels.errors import ArgumentError
from sarqc_kernels.w4a16.experts import w4a16_experts
from sarqc_kernels.w4a16.layout import RepackedWeight
from sarqc_kernels.w4a16.matmul import w4a16_matmul
from sarqc_kernels.w4a16.routing import route

__all__ = ["DECODE_TOKENS", "warm_up"]

DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batch sizes of decode steps that servers commonly capture."""


def warm_up(
    weights: nn.Module | RepackedWeight | Sequence[RepackedWeight],
    *,
    tokens: Sequence[int] = DECODE_TOKENS,
    dtype: torch.dtype = torch.bfloat16,
    top_k: int = 2,
) -> int:
    """Compile and build everything that calls with these weights will run.

    Args:
        weights: a repacked weight, several of them, or a module; of a module, each submodule counts that has a method
            `prepared()` which returns a `RepackedWeight`. Two weights of experts in a row whose shapes are those of
            gate_up and down are run as the experts of a layer too.
        tokens: rows of x of the calls to come. Plans depend on them, so list each batch size of a CUDA graph.
        dtype: of the activations to come.
        top_k: experts of a token; a layer of experts gets `tokens * top_k` rows.

    Returns:
        The number of calls made; weights of one shape on one device are called once for each number of tokens.

    Raises:
        ArgumentError: for a number of tokens below 1, or where there is no weight.
    """
    if not tokens or min(tokens) < 1 or top_k < 1:
        raise ArgumentError(f"tokens = {list(tokens)} and top_k = {top_k}: pass numbers from 1 on")
    every = list(_weights_of(weights))
    if not every:
        raise ArgumentError(f"weights is {type(weights).__name__} without a repacked weight: repack or load one first")
    distinct = {_key(weight): weight for weight in every}
    layers = {(_key(a), _key(b)): (a, b) for a, b in pairwise(every) if _is_layer(a, b)}
    with torch.inference_mode():
        for count in tokens:
            for weight in distinct.values():
                _multiply(weight, count, dtype, top_k)
            for gate_up, down in layers.values():
                _run_experts(gate_up, down, count, dtype, top_k)
    for device in {weight.words.device for weight in every}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return len(tokens) * (len(distinct) + len(layers))


def _weights_of(weights: nn.Module | RepackedWeight | Iterable[RepackedWeight]) -> Iterator[RepackedWeight]:
    if isinstance(weights, RepackedWeight):
        yield weights
    elif isinstance(weights, nn.Module):
        for module in weights.modules():
            prepared = getattr(module, "prepared", None)
            weight = prepared() if callable(prepared) else None
            if isinstance(weight, RepackedWeight):
                yield weight
    else:
        yield from weights


def _key(weight: RepackedWeight) -> tuple[Any, ...]:
    """What compilation and plans depend on."""
    return (
        weight.words.device, weight.words.shape[0], weight.zeros is None, weight.scales.dtype, weight.layout,
        weight.bits, weight.out_features, weight.in_features, weight.group_size,
    )  # fmt: skip


def _is_layer(gate_up: RepackedWeight, down: RepackedWeight) -> bool:
    experts = gate_up.words.shape[0]
    return experts > 1 and down.words.shape[0] == experts and gate_up.out_features == 2 * down.in_features


def _multiply(weight: RepackedWeight, tokens: int, dtype: torch.dtype, top_k: int) -> None:
    experts, device = weight.words.shape[0], weight.words.device
    rows = tokens if experts == 1 else tokens * top_k
    x = torch.zeros(rows, weight.in_features, dtype=dtype, device=device)
    w4a16_matmul(x, weight, None if experts == 1 else _offsets(rows, experts, device))


def _run_experts(gate_up: RepackedWeight, down: RepackedWeight, tokens: int, dtype: torch.dtype, top_k: int) -> None:
    experts, device, rows = gate_up.words.shape[0], gate_up.words.device, tokens * top_k
    choices = torch.arange(rows, device=device).view(tokens, top_k) % experts
    x = torch.zeros(tokens, gate_up.in_features, dtype=dtype, device=device)
    weights = torch.zeros(tokens, top_k, dtype=dtype, device=device)
    w4a16_experts(x, gate_up, down, route(choices, weights, experts))


def _offsets(rows: int, experts: int, device: torch.device) -> Tensor:
    """int64 [E + 1]: rows dealt out evenly."""
    return torch.arange(experts + 1, device=device) * rows // experts

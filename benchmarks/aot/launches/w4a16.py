"""Launches of W4A16: every block of `config`, dense and by expert, sums over splits, routing and its end."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.aot.jobs import Launch
from sarqc_kernels.aot import TENSOR_CORE
from sarqc_kernels.device import Device
from sarqc_kernels.w4a16 import config
from sarqc_kernels.w4a16.config import Plan
from sarqc_kernels.w4a16.layout import TILE_K, TILE_N, TILES, RepackedWeight
from sarqc_kernels.w4a16.routing import Routing
from sarqc_kernels.w4a16.triton import experts as layer
from sarqc_kernels.w4a16.triton import launch, route

OUTPUTS, INPUTS, RAGGED = 256, 5 * TILE_K, 5 * TILE_K - 48
EXPERTS, TOP_K, TOKENS = 128, 8, 32
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def launches(gpu: Device) -> Iterator[Launch]:
    """Blocks with two groups to a tile stand for asymmetric codes, experts and a bias as well."""
    plans = config.configurations(gpu)
    for plan, groups in plans:
        two = groups == 2
        by_expert = two and plan.kernel != "expand"
        yield _product(gpu, plan, weight_of(TILE_K // groups, asymmetric=two, experts=by_expert))
        if groups <= 2 and plan.kernel != "expand":
            yield _product(gpu, plan, weight_of(TILE_K // groups, asymmetric=two, experts=True), gated=True)
    last = next(plan for plan, _ in reversed(plans) if plan.kernel == "dot")
    yield _product(gpu, last, weight_of(TILE_K, asymmetric=True), torch.float16)
    yield _product(gpu, config.dot(16, 1, gpu), weight_of(64, inputs=RAGGED))
    yield _product(gpu, last, weight_of(INPUTS))
    for bits, plan in config.other_widths(gpu):
        yield _product(gpu, plan, weight_of(TILE_K // config.WIDTHS_GROUPS, asymmetric=True, bits=bits))
    yield from _sums()
    for tokens in (1, 1024):
        choices = torch.zeros(tokens, TOP_K, dtype=torch.int64)
        yield Launch(
            f"top-{TOP_K} of {tokens}", partial(route.route, choices, torch.ones(tokens, TOP_K).bfloat16(), 128)
        )


def weight_of(
    group_size: int, *, asymmetric: bool = False, experts: bool = False, inputs: int = INPUTS, bits: int = 4
) -> RepackedWeight:
    """A packed weight of nothing in particular."""
    count, k_tiles, groups = EXPERTS if experts else 1, -(-inputs // TILE_K), -(-inputs // group_size)
    words = torch.empty(count, OUTPUTS // TILE_N, k_tiles, 256 * bits, dtype=torch.int32)
    scales = torch.ones(count, groups, OUTPUTS, dtype=torch.bfloat16)
    zeros = torch.zeros_like(scales, dtype=torch.uint8) if asymmetric else None
    return RepackedWeight(words, scales, zeros, TILES, bits, OUTPUTS, inputs, group_size)


def _product(
    gpu: Device, plan: Plan, weight: RepackedWeight, dtype: torch.dtype = torch.bfloat16, *, gated: bool = False
) -> Launch:
    """Gated ones read their rows by index, as the experts' first product does."""
    x, by_expert = torch.zeros(TOKENS, weight.in_features, dtype=dtype), weight.words.shape[0] > 1
    groups = config.groups_per_tile(weight.group_size, weight.in_features)
    plan = plan.fitting(gated=gated, asymmetric=weight.zeros is not None, experts=int(by_expert), groups=groups)
    flags = (("persistent", plan.resident), ("ragged", weight.in_features % TILE_K), ("gated", gated))
    kinds = [word for word, true in flags if true]
    grid = f"g{weight.group_size}{'s' if weight.zeros is None else 'a'}{' by expert' * by_expert}"
    block = f"{plan.tokens}x{plan.block_n} split{plan.splits}" if plan.kernel == "dot" else f"{plan.block_n} rows"
    name = " ".join([f"{weight.bits} bits", block, *kinds, NAMES[dtype], grid])
    if plan.kernel == "expand":
        return Launch(name, partial(launch.run, plan, x, weight, None, None))
    offsets, index = (torch.zeros(EXPERTS + 1, dtype=torch.int64), torch.zeros(TOKENS, dtype=torch.int64))
    bias = x.new_zeros(weight.words.shape[0], weight.out_features) if weight.zeros is not None and not gated else None
    call = partial(
        launch.product, plan, x, weight, offsets if by_expert else None, bias, index if gated else None, gated
    )
    return Launch(name, call, {"dot": _wanted(gpu)})


def _wanted(gpu: Device) -> tuple[str, ...]:
    """What a dot's machine code must show. On sm_90 weights go from the register that held the word into the tensor
    core, and words come 16 bytes at a time."""
    return ("HGMMA from registers", "16-byte LDGSTS") if gpu.arch == 90 else (TENSOR_CORE[gpu.arch],)


def _sums() -> Iterator[Launch]:
    offsets, parts = torch.zeros(EXPERTS + 1, dtype=torch.int64), torch.zeros(2, TOKENS, OUTPUTS)
    weight = weight_of(TILE_K, experts=True)
    for name, by, gated in (("", None, False), ("by expert", offsets, False), ("gated", offsets, True)):
        yield Launch(name, partial(launch.summed, parts, weight, by, torch.bfloat16, gated))
    rows = torch.zeros(TOKENS, dtype=torch.int64)
    routing = Routing(offsets, rows, rows.view(TOP_K, -1), torch.ones(TOKENS).bfloat16())
    x: Tensor = torch.zeros(TOKENS // TOP_K, INPUTS, dtype=torch.bfloat16)
    yield Launch(f"top-{TOP_K}", partial(layer.combined, parts, x, routing))

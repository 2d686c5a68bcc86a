"""How much a run will take: bytes on disk and seconds. From shapes alone; `memory` counts what it holds.

Sizes on disk are exact up to headers. Time is flops and calls, over a rate and a latency that are measured on this
machine in a fraction of a second; reading and writing is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from sarqc.checkpoint.formats import NEUTRAL, Format
from sarqc.config import QuantConfig
from sarqc.estimation import shapes
from sarqc.method.lambda_search import EXPERTS
from sarqc.method.weight import QuantizedWeight
from sarqc.model.sites import Site, SiteChunk
from sarqc.pipeline.plan import Plan
from sarqc.pipeline.quantize_site import scale_dtype
from sarqc.pipeline.sensitivity import TOKENS as LOOKED
from sarqc.pipeline.sensitivity import TRIED_LENGTH, TRIED_WINDOWS
from sarqc.pipeline.work_split import cost, work_items


@dataclass(frozen=True)
class Sizes:
    """Bytes. quantized: of the quantized Linears in the output. left: of all other tensors. neutral: of the quantized
    Linears in the format of finished blocks. hidden: of hidden states of all windows."""

    quantized: int
    left: int
    neutral: int
    hidden: int

    @property
    def output(self) -> int:
        """Bytes of the checkpoint's tensors."""
        return self.quantized + self.left

    @property
    def work(self) -> int:
        """Bytes of the work folder at most: the finished checkpoint, and hidden states beside those before them."""
        return self.neutral + self.left + 2 * self.hidden


def sizes(plan: Plan, windows: int, seqlen: int) -> Sizes:
    """Bytes on disk of a run over `windows` windows of `seqlen` tokens."""
    quantized = neutral = 0
    names = set(plan.source.names())
    kinds: dict[tuple[int, int, torch.dtype], int] = {}
    for target in plan.targets.selected:
        names.discard(f"{target.linear}.weight")
        kind = (*target.shape, scale_dtype(plan.source, target.linear))
        kinds[kind] = kinds.get(kind, 0) + 1
    for (rows, columns, dtype), count in kinds.items():
        quantized += count * _packed_bytes(plan.format, plan.quant, rows, columns, dtype)
        neutral += count * _packed_bytes(NEUTRAL, plan.quant, rows, columns, dtype)
    if plan.quant.avg_bits is not None:
        quantized = round(plan.quant.avg_bits * sum(prod(target.shape) for target in plan.targets.selected) / 8)
        neutral = quantized
    left = sum(shapes.stored_bytes(plan, name) for name in names)
    return Sizes(quantized, left, neutral, shapes.states_bytes(plan, windows, seqlen))


@dataclass(frozen=True)
class Time:
    """Seconds of each stage, and what they are reckoned from."""

    seconds: dict[str, float]
    basis: str

    @property
    def total(self) -> float:
        """Seconds of the run."""
        return sum(self.seconds.values())


CALLS = 150
"""Calls that one micro-batch takes through a block, hooks and masks included."""
CALLS_A_COLUMN = 0.6
"""Calls that the solver takes for a column of a site."""
PRODUCTS = 2
"""Products of the weight with a K x K matrix that one sweep over codes and scales takes, all in all."""
PASSES = 120
"""Times that the search for the grid passes over a weight."""


def seconds(plan: Plan, windows: int, seqlen: int, ranks: int = 1) -> Time:
    """How long the blocks will take on this machine, or on so many ranks like this one."""
    rate, latency, stream = _measure(plan.device)
    windows = -(-windows // ranks)  # of the busiest rank
    tokens = windows * seqlen
    batches = -(-windows // plan.micro_batch(seqlen)) if windows else 0
    spent = dict.fromkeys(("reference", "forward", "solve"), 0.0)
    looked = min(tokens * ranks, LOOKED) if plan.quant.avg_bits is not None else 0  # every rank runs all of it
    for _, sites in shapes.blocks(plan):
        forward = grams = solve = columns = passed = 0.0
        for site in sites:
            rows = sum(out for _, _, out in site.slabs)
            used = min(site.experts, shapes.choices(plan)) if site.experts > 1 else 1
            forward += 2.0 * tokens * used * rows * site.in_features
            grams += 2.0 * tokens * used * site.in_features**2
            products = 1 + PRODUCTS * plan.method.cd_passes
            solve += site.experts * (site.in_features**3 + 2.0 * products * rows * site.in_features**2)
            columns += (1 + plan.method.cd_passes) * site.in_features
            passed += PASSES * site.experts * rows * site.in_features
        share = busiest(sites, ranks, plan.device, gram=windows > 0)
        calls = CALLS * batches * latency
        times = 2 if plan.method.channel_scales else 1  # scales are searched for in a run of the block that is dropped
        if windows:
            spent["forward"] += (times * forward + grams) / rate + times * calls
            spent["reference"] += plan.method.error_correction * (forward / rate + calls)
            spent["solve"] += share * (solve / rate + CALLS_A_COLUMN * columns * latency)
        spent["solve"] += share * (passed / stream + 100 * len(sites) * latency)
        if looked:
            trials = len(sites) * TRIED_WINDOWS * TRIED_LENGTH * len(plan.lazy.blocks) / 2 / ranks
            solved = 3 * sum(min(site.experts, EXPERTS) * site.in_features**3 for site in sites)
            each = (2 * forward + grams) * looked / tokens + forward * trials / tokens + solved / ranks
            spent["sensitivity"] = spent.get("sensitivity", 0.0) + each / rate
    basis = (
        f"{rate / 1e9:.0f} GFLOP/s, {stream / 1e9:.1f} G elements/s and {1e6 * latency:.0f} us a call measured on "
        f"{plan.device}; reading and writing not counted"
        + (f", nor what {ranks} ranks tell each other" if ranks > 1 else "")
    )
    return Time(spent, basis)


def busiest(sites: list[Site], ranks: int, device: torch.device, *, gram: bool) -> float:
    """SiteChunk of the solving of a block that falls to the rank that has most of it."""
    loads = [0.0] * ranks
    for item in work_items([SiteChunk(site, 0, site.experts) for site in sites], ranks, device, gram=gram):
        loads[item.owner] += cost(item.chunk)
    return max(loads) / max(sum(loads), 1.0)


def bits_per_weight(plan: Plan, found: Sizes) -> float:
    """Bits on disk of each quantized weight, scales and zeros included."""
    return 8 * found.quantized / sum(prod(target.shape) for target in plan.targets.selected)


def _measure(device: torch.device) -> tuple[float, float, float]:
    """Matmul flop/s in fp32, seconds of a small call, and elements/s of a pass over memory; a fraction of a second."""
    size = 512 if device.type == "cpu" else 4096
    square, small = torch.ones(size, size, device=device), torch.ones(8, 8, device=device)
    long = torch.ones(1 << 20, device=device)
    rate = 2.0 * size**3 / _least(lambda: square @ square, device)
    return rate, _least(lambda: small @ small, device), long.numel() / _least(lambda: long * 2.0, device)


def _least(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the quickest of several calls, which is the one that was disturbed least."""
    found = []
    for _ in range(7):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return max(min(found), 1e-7)


def _packed_bytes(format: Format, quant: QuantConfig, rows: int, columns: int, dtype: torch.dtype) -> int:
    """Bytes of one Linear in a format, by packing thin ones: they grow evenly with every 32 rows."""

    def packed(count: int) -> int:
        grid = torch.ones(1, count, quant.groups(columns), dtype=dtype)
        middle = torch.full(grid.shape, 1 << (quant.bits - 1), dtype=torch.uint8)
        codes = torch.zeros(1, count, columns, dtype=torch.uint8)
        tensors = format.pack("linear", QuantizedWeight(codes, grid, middle, quant.bits), quant)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    step = packed(64) - packed(32)
    fixed = packed(32) - step
    return fixed + rows // 32 * step + (packed(rows % 32) - fixed if rows % 32 else 0)

"""Launches of the Gram, the cross-Gram and what finishes them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.aot.jobs import Launch
from sarqc_kernels.aot import TENSOR_CORE
from sarqc_kernels.device import Device
from sarqc_kernels.gram import cholesky_impl, config, cross_impl, finalize_impl, triton_impl

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
EVEN, ODD = 512, 500  # inputs


def launches(gpu: Device) -> Iterator[Launch]:
    """Every tile; a single input has kernels of its own, as Triton makes 1 a constant."""
    for arch, dtype, even, tile in config.configurations():
        if arch == gpu.arch:
            for inputs in (EVEN,) if even else (ODD, 1):
                yield _accumulate(gpu, dtype, inputs, tile)
    core = {"cross": (TENSOR_CORE[gpu.arch],)}
    for inputs, access in ((EVEN, "even"), (ODD, "odd")):
        for name, dtype, of_residual in (
            ("bf16 halves", torch.bfloat16, torch.float32),
            ("bf16", torch.bfloat16, torch.bfloat16),
            ("fp32", torch.float32, torch.float32),
        ):
            cross, x = torch.empty(inputs, inputs), torch.empty(64, inputs, dtype=dtype)
            arguments = (cross, torch.zeros(64, inputs, dtype=of_residual), x)
            yield Launch(f"{name} {access}", partial(cross_impl.cross_gram_accumulate_, *arguments), core)
        gram, rows, numbers = torch.empty(2, inputs, inputs), torch.zeros(2, dtype=torch.int64), torch.empty(2, inputs)
        finished = (gram, rows, numbers, torch.empty(2), 0.01)
        yield Launch(access, partial(finalize_impl.gram_finalize, *finished))
        yield Launch(access, partial(cholesky_impl.cholesky_upper, gram))


def _accumulate(gpu: Device, dtype: torch.dtype, inputs: int, tile: config.Tile) -> Launch:
    access = "bulk" if tile.descriptors else {EVEN: "even", ODD: "odd", 1: "one input"}[inputs]
    name = f"{NAMES[dtype]} {tile.m}x{tile.n}x{tile.depth} w{tile.warps} s{tile.stages} {access}"
    sums = (torch.empty(2, inputs, inputs), torch.zeros(2, dtype=torch.int64), torch.empty(2, inputs))
    plan = config.Plan(tile, splits=2, programs=4)
    x = torch.empty(64, inputs, dtype=dtype)
    wanted = (TENSOR_CORE[gpu.arch], *(("UTMALDG",) * tile.descriptors))
    return Launch(name, partial(triton_impl.launch, plan, *sums, x, None), {"accumulate": wanted})

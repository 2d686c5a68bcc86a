"""A persistent grid walks every tile once and gives the bits of a plain one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sarqc_kernels.device import Device, device_info
from sarqc_kernels.testing import random_quantized
from sarqc_kernels.w4a16 import config, repack

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from sarqc_kernels.w4a16.triton import launch  # noqa: E402
from sarqc_kernels.w4a16.triton.kernels import swizzled  # noqa: E402


@triton.jit
def places_kernel(out, blocks, row_tiles):
    number = tl.program_id(0)
    block, tile = swizzled(number, blocks, row_tiles)
    tl.store(out + 2 * number, block)
    tl.store(out + 2 * number + 1, tile)


# few rows and tokens, so that the interpreter has many tiles to walk
WALKING = replace(config.persistent(Device(90, 132)), block_m=16, block_n=64, warps=4)


@pytest.mark.parametrize("experts", [0, 5])
@pytest.mark.parametrize("gated", [False, True])
def test_a_persistent_grid_gives_the_bits_of_a_plain_one(
    experts: int, gated: bool, device: str, generator: torch.Generator
) -> None:
    """More tiles than programs, ragged in rows and tokens, experts without a token, rows of no expert."""
    weight = random_quantized(generator, (max(1, experts), 150, 160), 5, 4, sym=False, scale_dtype=torch.bfloat16)
    x = torch.randn(40, 160, generator=generator).bfloat16().to(device)
    bias = None if gated else torch.randn(max(1, experts), 150, generator=generator).bfloat16().to(device)
    offsets = torch.tensor([0, 0, 21, 21, 38, 39], device=device) if experts else None
    index = torch.randperm(40, generator=generator).to(device) if gated else None
    ready = repack(weight.codes, weight.scales, weight.zeros, bits=4, layout="tiles", device=device)
    out = [
        launch.product(plan, x, ready, offsets, bias, index, gated) for plan in (WALKING, replace(WALKING, resident=0))
    ]
    assert out[0].isfinite().all() and bool(out[0].any()) and torch.equal(*out)


def test_a_persistent_grid_takes_every_tile_once(device: str) -> None:
    for blocks, row_tiles in ((1, 5), (8, 3), (19, 4)):
        out = torch.zeros(blocks * row_tiles, 2, dtype=torch.int32, device=device)
        places_kernel[(blocks * row_tiles,)](out, blocks, row_tiles)
        assert sorted(map(tuple, out.tolist())) == [(b, t) for b in range(blocks) for t in range(row_tiles)]
        first = out[: 8 * row_tiles].cpu()
        assert int(first[:, 0].max()) == min(8, blocks) - 1  # eight tiles of tokens with all tiles of rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_graph_repeats_it_on_a_card(generator: torch.Generator) -> None:
    """Large enough that every processor has several tiles."""
    weight = random_quantized(generator, (1, 8192, 1024), 8, 4, scale_dtype=torch.bfloat16)
    ready = repack(weight.codes, weight.scales, None, bits=4, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(2000, 1024, generator=generator).bfloat16().cuda()
    plan = config.persistent(device_info(x.device))
    want = launch.run(plan, x, ready, None, None)
    assert torch.equal(want, launch.run(replace(plan, resident=0), x, ready, None, None))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch.run(plan, x, ready, None, None)
    graph.replay()
    assert torch.equal(out, want)

"""What the CPU backend costs, step by step, on shapes of SmolLM2-135M: for seeing a change, not for a claim.

make bench                                   times, side by side
.venv/bin/python -m pytest benchmarks/micro/bench_references.py --benchmark-autosave, then --benchmark-compare
"""

from __future__ import annotations

import pytest
import torch

from sarqc_kernels import (
    fit_grid,
    gram_accumulate_,
    gram_finalize,
    pack,
    quantize_columns,
    repack,
    round_to_grid,
    unpack,
    w4a16_matmul,
)
from sarqc_kernels.testing import random_quantized, upper_factor

ROWS, INPUTS, GROUP = 576, 576, 64
RULE = {"bits": 4, "group_size": GROUP, "sym": True, "scale_dtype": torch.bfloat16}


@pytest.fixture(scope="module")
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def hessian(generator) -> torch.Tensor:
    x = torch.randn(2 * INPUTS, INPUTS, generator=generator)
    return (x.T @ x / len(x))[None]


@pytest.fixture(scope="module")
def weight(generator) -> torch.Tensor:
    return torch.randn(1, ROWS, INPUTS, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("experts", [1, 8])
def test_gram(benchmark, generator, experts, dtype):
    x = torch.randn(1024, INPUTS, generator=generator).to(dtype)
    offsets = torch.linspace(0, len(x), experts + 1).long()
    sums = torch.zeros(experts, INPUTS, INPUTS), torch.zeros(experts, dtype=torch.int64), torch.zeros(experts, INPUTS)
    benchmark(gram_accumulate_, *sums, x, offsets)


def test_finalize(benchmark, hessian):
    rows, salience = torch.tensor([7]), torch.ones(1, INPUTS)
    benchmark(gram_finalize, hessian, rows, salience, torch.tensor([0.5]), 0.01)


def test_factor(benchmark, hessian):
    benchmark(torch.linalg.cholesky_ex, hessian)


@pytest.mark.parametrize("search", [False, True], ids=["minmax", "search"])
def test_columns(benchmark, weight, hessian, search):
    benchmark(quantize_columns, weight, upper_factor(hessian), None, None, None, search=search, **RULE)


@pytest.mark.parametrize("search", [False, True], ids=["minmax", "search"])
def test_fit_grid(benchmark, weight, search):
    benchmark(fit_grid, weight, None, search=search, **RULE)


def test_round_to_grid(benchmark, weight):
    benchmark(round_to_grid, weight, *fit_grid(weight, None, search=False, **RULE), bits=4)


@pytest.mark.parametrize("bits", [3, 4])
def test_pack(benchmark, generator, bits):
    benchmark(pack, random_quantized(generator, (1, ROWS, INPUTS), INPUTS // GROUP, bits).codes, bits)


@pytest.mark.parametrize("bits", [3, 4])
def test_unpack(benchmark, generator, bits):
    words = pack(random_quantized(generator, (1, ROWS, INPUTS), INPUTS // GROUP, bits).codes, bits)
    benchmark(unpack, words, bits, INPUTS)


@pytest.mark.parametrize("layout", ["stream", "int4pack"])
@pytest.mark.parametrize("tokens", [1, 128])
def test_matmul(benchmark, generator, layout, tokens):
    quantized = random_quantized(generator, (1, ROWS, INPUTS), INPUTS // GROUP, 4, scale_dtype=torch.bfloat16)
    weight = repack(quantized.codes, quantized.scales, None, bits=4, dtype=torch.bfloat16, layout=layout)
    benchmark(w4a16_matmul, torch.randn(tokens, INPUTS, generator=generator).bfloat16(), weight)

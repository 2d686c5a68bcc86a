"""csrc/gemv.cu on a CPU: compiled by the host's compiler, its threads one after another, held against float64.

The same source that nvcc compiles: what it computes is seen here, what nvcc makes of it in the ahead-of-time check, and
what a card makes of that on a GPU only (test_w4a16.py runs every backend there).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sarqc_kernels.build import sources
from sarqc_kernels.testing import dequantize, random_quantized
from sarqc_kernels.w4a16 import RepackedWeight, cuda, repack, w4a16_matmul

TENSORS = ("words", "scales", "zeros")
HOST = Path(__file__).parent / "host_cuda"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    made = tmp_path_factory.mktemp("csrc") / "gemv.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    include = ["-I", str(HOST), "-I", str(sources())]
    subprocess.run([compiler, *flags, *include, "-o", str(made), str(HOST / "gemv.cpp")], check=True)
    return cuda.bind(ctypes.CDLL(str(made)))


CASES = [
    # rows, inputs, groups, sym, tokens, bias: rows beyond a block, broken k_tiles, groups of 16 .. 256 and a row
    (32, 128, 1, True, 1, False),
    (70, 4096, 32, True, 1, True),
    (33, 192, 3, False, 2, False),
    (64, 288, 9, False, 3, True),
    (100, 2176, 17, True, 4, False),
    (40, 1024, 4, False, 4, True),
    (31, 256, 16, True, 2, False),
    (65, 76, 1, False, 1, False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_within_the_bound_of_float64(
    case: tuple, dtype: torch.dtype, scale_dtype: torch.dtype, library: ctypes.CDLL, generator: torch.Generator
) -> None:
    def on_the_host(x: Tensor, ready: RepackedWeight, bias: Tensor | None) -> Tensor:
        out = torch.full((len(x), ready.out_features), float("nan"), dtype=x.dtype)
        assert cuda.unfit(x, ready, None) is None
        assert library.sarqc_gemv(cuda.filled(x, ready, bias, out), None) == 0
        return out

    check(case, dtype, scale_dtype, generator, on_the_host)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_card(case: tuple, dtype: torch.dtype, generator: torch.Generator) -> None:
    def on_the_card(x: Tensor, ready: RepackedWeight, bias: Tensor | None) -> Tensor:
        there = ready._replace(**{name: None if part is None else part.cuda() for name, part in zip(TENSORS, ready)})
        args = (x.cuda(), there, None, None if bias is None else bias.cuda())
        if reason := cuda.unsupported(*args):
            pytest.skip(reason)
        out = w4a16_matmul(*args, backend="cuda")
        assert torch.equal(out, w4a16_matmul(*args, backend="cuda"))
        return out.cpu()

    check(case, dtype, torch.bfloat16, generator, on_the_card)


def check(
    case: tuple,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    generator: torch.Generator,
    product: Callable[[Tensor, RepackedWeight, Tensor | None], Tensor],
) -> None:
    rows, inputs, groups, sym, tokens, biased = case
    weight = random_quantized(generator, (1, rows, inputs), groups, 4, sym=sym, scale_dtype=scale_dtype)
    ready = repack(weight.codes, weight.scales, None if sym else weight.zeros, bits=4, layout="tiles")
    x = torch.randn(tokens, inputs, generator=generator).to(dtype)
    bias = torch.randn(1, rows, generator=generator).to(dtype) if biased else None
    out = product(x, ready, bias)
    values = dequantize(weight)[0].double()
    exact = x.double() @ values.T + (0 if bias is None else bias.double())
    # every weight is exact; inputs + 1 terms summed in fp32, one rounding to dtype
    slack = (inputs + 1) * 2.0**-23 * (x.double().abs() @ values.abs().T + 1) + torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((out.double() - exact).abs() <= slack + 2.0**-14 * torch.finfo(dtype).eps).all()


def test_identity_shows_the_weight(library: ctypes.CDLL, generator: torch.Generator) -> None:
    weight = random_quantized(generator, (1, 75, 128), 4, 4, sym=False, scale_dtype=torch.bfloat16)
    ready = repack(weight.codes, weight.scales, weight.zeros, bits=4, layout="tiles")
    eye = torch.eye(128, dtype=torch.bfloat16)
    for first in range(0, 128, 4):
        out = torch.empty(4, 75, dtype=torch.bfloat16)
        library.sarqc_gemv(cuda.filled(eye[first : first + 4], ready, None, out), None)
        assert torch.equal(out, dequantize(weight)[0].T[first : first + 4].bfloat16())


def test_says_what_it_does_not_take(generator: torch.Generator) -> None:
    def ready(inputs: int = 128, bits: int = 4, layout: str = "tiles") -> RepackedWeight:
        weight = random_quantized(generator, (1, 8, inputs), 1, bits, scale_dtype=torch.bfloat16)
        return repack(weight.codes, weight.scales, None, bits=bits, layout=layout)

    x = torch.zeros(4, 128, dtype=torch.bfloat16)
    for args, reason in (
        ((x[:1].expand(5, 128), ready(), None), "5 tokens"),
        ((x, ready(), torch.tensor([0, 4])), "grouped by expert"),
        ((x, ready(bits=3), None), "3 bits"),
        ((x, ready(layout="stream"), None), "'stream'"),
        ((x.float(), ready(), None), "x is torch.float32"),
        ((x, ready(inputs=130), None), "130 inputs"),
    ):
        assert reason in (cuda.unfit(*args) or "")

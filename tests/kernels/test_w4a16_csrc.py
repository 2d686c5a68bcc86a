"""csrc/gemv.cu on a CPU: compiled by the host's compiler, its threads as fibers, held against float64.

The same source that nvcc compiles, warps, blocks and clusters included: what it computes is seen here, what nvcc makes
of it in the ahead-of-time check, and what a GPU makes of that on a GPU only.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from benchmarks.aot import sass
from sarqc_kernels import build
from sarqc_kernels.build import sources
from sarqc_kernels.device import Device
from sarqc_kernels.errors import BackendError
from sarqc_kernels.testing import Quantized, dequantize, random_quantized
from sarqc_kernels.w4a16 import RepackedWeight, Routing, cuda, repack, w4a16_matmul
from sarqc_kernels.w4a16.gemv import GemvPlan, gemv_plan

TENSORS = ("words", "scales", "zeros")
HOST = Path(__file__).parent / "host_cuda"
H200 = Device(90, 132)

Libraries = Callable[[tuple[str, ...]], ctypes.CDLL]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Libraries:
    """The library of some macros, compiled once."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder, made = tmp_path_factory.mktemp("csrc"), {}
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    include = ["-I", str(HOST), "-I", str(sources())]

    def library(macros: tuple[str, ...]) -> ctypes.CDLL:
        if macros not in made:
            target = folder / f"gemv{len(made)}.so"
            own = [f"-D{macro}" for macro in macros]
            subprocess.run([compiler, *flags, *own, *include, "-o", str(target), str(HOST / "gemv.cpp")], check=True)
            made[macros] = cuda.bind(ctypes.CDLL(str(target)))
        return made[macros]

    return library


def run(
    libraries: Libraries, x: Tensor, weight: RepackedWeight, plan: GemvPlan, **more: Tensor | bool | None
) -> Tensor:
    """The product by the host's library; what it does not write stays NaN."""
    rows = len(x) if more.get("index") is None else len(more["index"])
    outputs = weight.out_features // 2 if more.get("gated") else weight.out_features
    out = torch.full((rows, outputs), float("nan"), dtype=x.dtype)
    call = cuda.launch_arguments(x, weight, out, plan, **more)
    assert libraries(cuda.defines(x, weight)).sarqc_gemv(call, plan.columns, plan.blocks, plan.tiles, None) == 0
    return out


def plan_of(rows: int, weight: RepackedWeight, experts: int = 0, *, gated: bool = False, **own: int) -> GemvPlan:
    """What is chosen, with some of it changed: the blocks follow from warps_n, and x comes in chunks as it must."""
    outputs = weight.out_features // 2 if gated else weight.out_features
    plan = gemv_plan(rows, outputs, weight.words.shape[2], weight.bits, experts, gated, H200)
    if not own:
        return plan
    plan = replace(plan, **own)
    height = plan.warps_n * (16 if gated else 32)
    return replace(plan, blocks=-(-outputs // height))


CASES = [
    # rows, inputs, groups, sym, tokens, bias, plan: rows beyond a block, broken tiles, groups of 16 .. 256 and a row
    (32, 128, 1, True, 1, False, {}),
    (70, 2048, 16, True, 1, True, {}),
    (33, 192, 3, False, 2, False, {"splits": 2, "chunk": 8}),
    (64, 288, 9, False, 3, True, {"warps_n": 2, "chunk": 4}),
    (100, 2176, 17, True, 4, False, {"warps_n": 1, "splits": 2, "chunk": 8}),
    (150, 1024, 4, False, 8, True, {"warps_n": 4, "splits": 4, "chunk": 2}),
    (40, 1280, 10, False, 7, True, {"warps_n": 8, "splits": 1, "chunk": 3}),
    (31, 256, 16, True, 9, False, {"warps_n": 8, "chunk": 1}),
    (65, 72, 1, False, 16, False, {"warps_n": 1, "chunk": 8}),
    (65, 640, 5, True, 13, True, {"warps_n": 2, "chunk": 4, "splits": 1}),
]
WIDTHS = [(2, 0), (3, 1), (4, 0), (4, 1), (8, 0), (3, 0), (2, 1), (8, 1)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("width", WIDTHS, ids=lambda width: f"W{width[0]}{'fp16' if width[1] else 'bf16'}")
def test_within_the_bound_of_float64(
    case: tuple, width: tuple[int, int], libraries: Libraries, generator: torch.Generator
) -> None:
    bits, half = width
    dtype = torch.float16 if half else torch.bfloat16
    scale_dtype = torch.float32 if width == (3, 1) else torch.bfloat16

    def on_the_host(x: Tensor, ready: RepackedWeight, bias: Tensor | None) -> Tensor:
        assert cuda.unsupported_product(x, ready, len(x), False) is None
        return run(libraries, x, ready, plan_of(len(x), ready, **case[-1]), bias=bias)

    check(case, dtype, scale_dtype, generator, on_the_host, bits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_on_a_gpu(case: tuple, width: tuple[int, int], generator: torch.Generator) -> None:
    def on_the_gpu(x: Tensor, ready: RepackedWeight, bias: Tensor | None) -> Tensor:
        there = ready._replace(**{name: None if part is None else part.cuda() for name, part in zip(TENSORS, ready)})
        args = (x.cuda(), there, None, None if bias is None else bias.cuda())
        if reason := cuda.unsupported(*args):
            pytest.skip(reason)
        out = w4a16_matmul(*args, backend="cuda")
        assert torch.equal(out, w4a16_matmul(*args, backend="cuda"))
        return out.cpu()

    check(case, torch.float16 if width[1] else torch.bfloat16, torch.bfloat16, generator, on_the_gpu, width[0])


def check(
    case: tuple,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    generator: torch.Generator,
    product: Callable[[Tensor, RepackedWeight, Tensor | None], Tensor],
    bits: int,
) -> None:
    rows, inputs, groups, sym, tokens, biased, _ = case
    weight = random_quantized(generator, (1, rows, inputs), groups, bits, sym=sym, scale_dtype=scale_dtype)
    ready = repack(weight.codes, weight.scales, None if sym else weight.zeros, bits=bits, layout="tiles")
    x = torch.randn(tokens, inputs, generator=generator).to(dtype)
    bias = torch.randn(1, rows, generator=generator).to(dtype) if biased else None
    within_the_bound(product(x, ready, bias), x, dequantize(weight)[0], bias)


def within_the_bound(out: Tensor, x: Tensor, values: Tensor, bias: Tensor | None = None) -> None:
    """Every weight is exact; inputs + 1 terms are summed in fp32, and the result is rounded once."""
    values, inputs = values.double(), x.shape[1]
    exact = x.double() @ values.T + (0 if bias is None else bias.double())
    eps = torch.finfo(x.dtype).eps
    slack = (inputs + 1) * 2.0**-23 * (x.double().abs() @ values.abs().T + 1) + eps / 2 * exact.abs()
    bad = ~((out.double() - exact).abs() <= slack + 2.0**-14 * eps)
    assert not bad.any(), list(zip(out[bad].tolist(), exact[bad].tolist()))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_identity_shows_the_weight(bits: int, groups: int, libraries: Libraries, generator: torch.Generator) -> None:
    weight = random_quantized(generator, (1, 75, 128), groups, bits, sym=False, scale_dtype=torch.bfloat16)
    ready = repack(weight.codes, weight.scales, weight.zeros, bits=bits, layout="tiles")
    eye = torch.eye(128, dtype=torch.bfloat16)
    for first in (0, 56, 112):
        out = run(libraries, eye[first : first + 16], ready, plan_of(16, ready))
        assert torch.equal(out, dequantize(weight)[0].T[first : first + 16].bfloat16())


def test_how_it_is_divided_changes_no_more_than_the_order_of_sums(
    libraries: Libraries, generator: torch.Generator
) -> None:
    """Integers that fp32 sums exactly in any order: every plan gives the same bits."""
    weight = random_quantized(generator, (1, 300, 1408), 11, 4, sym=True, scale_dtype=torch.bfloat16)
    weight = Quantized(weight.codes, torch.ones_like(weight.scales), weight.zeros)
    ready = repack(weight.codes, weight.scales, None, bits=4, layout="tiles")
    x = torch.randint(-8, 9, (5, 1408), generator=generator).bfloat16()
    exact = (x.double() @ dequantize(weight)[0].double().T).bfloat16()
    for warps_n in (1, 2, 4, 8):
        for splits, chunk in ((1, 16), (2, 8), (8, 8)):
            assert torch.equal(
                run(libraries, x, ready, plan_of(5, ready, warps_n=warps_n, splits=splits, chunk=chunk)), exact
            )


@pytest.mark.parametrize("offsets", [[0, 3, 3, 14, 20], [2, 2, 12, 13, 19], [0, 0, 0, 0, 0]], ids=str)
def test_experts(offsets: list[int], libraries: Libraries, generator: torch.Generator) -> None:
    """Ragged, more rows than a tile has, experts without rows, rows of no expert."""
    weight = random_quantized(generator, (4, 70, 384), 3, 4, sym=False, scale_dtype=torch.bfloat16)
    ready = repack(weight.codes, weight.scales, weight.zeros, bits=4, layout="tiles")
    bias = torch.randn(4, 70, generator=generator).bfloat16()
    x = torch.randn(20, 384, generator=generator).bfloat16()
    plan = plan_of(20, ready, 4)
    out = run(libraries, x, ready, plan, offsets=torch.tensor(offsets), bias=bias)
    assert out[: offsets[0]].isnan().all() and out[offsets[-1] :].isnan().all()
    for expert, (first, last) in enumerate(itertools.pairwise(offsets)):
        within_the_bound(out[first:last], x[first:last], dequantize(weight)[expert], bias[expert])


@pytest.mark.parametrize("plan", [{}, {"warps_n": 2, "splits": 2, "chunk": 4}], ids=str)
def test_gate_and_up_in_one(plan: dict[str, int], libraries: Libraries, generator: torch.Generator) -> None:
    """Rows by index, silu(gate) * up: within two roundings of fp32's own."""
    weight = random_quantized(generator, (3, 96, 256), 2, 4, sym=True, scale_dtype=torch.bfloat16)
    ready = repack(weight.codes, weight.scales, None, bits=4, layout="tiles")
    x = torch.randn(4, 256, generator=generator).bfloat16()
    index, offsets = torch.tensor([3, 0, 1, 2, 0, 3, 1]), torch.tensor([0, 2, 2, 7])
    own = plan_of(7, ready, 3, gated=True, **plan)
    out = run(libraries, x, ready, own, offsets=offsets, index=index, gated=True)
    values = dequantize(weight).double()
    for row in range(7):
        expert = 0 if row < 2 else 2
        gate, up = (values[expert] @ x[index[row]].double()).chunk(2)
        exact = torch.nn.functional.silu(gate) * up
        assert ((out[row].double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-4 * exact.abs().max()).all()


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The listing of each kernel of 4 bits in bf16 for sm_90a."""
    tools = pytest.importorskip("benchmarks.aot.compiler").TOOLS
    try:
        nvcc = build.nvcc()
    except BackendError as error:
        pytest.skip(str(error))
    cubin = tmp_path_factory.mktemp("sass") / "gemv.cubin"
    target = ["-std=c++17", "-O3", "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-o", str(cubin)]
    subprocess.run([nvcc, *target, str(sources() / "gemv.cu")], check=True)
    return sass.listing_of(cubin.read_bytes(), tools)


@pytest.mark.parametrize(("columns", "asym", "most"), [(1, 0, 1.8), (1, 1, 1.95), (2, 0, 2.3), (2, 1, 2.6)])
def test_instructions_of_a_weight(columns: int, asym: int, most: float, machine_code: dict[str, list[str]]) -> None:
    """In the loop over tiles, groups of 128. An mma has 8 weights of a lane for each column of 8 tokens."""
    name = f"gemvILi4ELb0ELi{columns}ELb1ELb{asym}E"
    values = [loop for kernel, body in machine_code.items() if name in kernel for loop in sass.loops(body)]
    counts = [loop.total() * columns / (8 * loop["HMMA"]) for loop in values if loop["HMMA"] and not loop["BAR"]]
    assert counts and min(counts) <= most
    assert not any("LDL" in line or "STL" in line for body in machine_code.values() for line in body)


def test_eight_tokens_run_the_kernel_of_one() -> None:
    """So they cost the same instructions a weight; nine take a second column."""
    plans = [gemv_plan(tokens, 4096, 112, 4, 0, False, H200) for tokens in (1, 8, 9, 16)]
    assert [plan.columns for plan in plans] == [1, 1, 2, 2]


@pytest.mark.parametrize("tokens", range(1, 17))
@pytest.mark.parametrize(
    "shape", [(4096, 4096), (4096, 14336), (28672, 4096), (8192, 28672), (1280, 8192), (768, 4096)]
)
def test_no_third_of_the_processors_is_idle(shape: tuple[int, int], tokens: int) -> None:
    plan = gemv_plan(tokens, shape[0], shape[1] // 128, 4, 0, False, H200)
    assert plan.programs * 3 >= 2 * H200.multiprocessors
    assert plan.splits in (1, 2, 4, 8) and plan.chunk % (8 // plan.warps_n) == 0


def test_one_block_of_a_cluster_before_sm_90() -> None:
    """Only later devices have clusters, which add up what the inputs' shares give."""
    for tokens in (1, 16):
        plan = gemv_plan(tokens, 1024, 64, 4, 0, False, Device(80, 108))
        room = Device(80, 108).shared_bytes // 2
        assert plan.splits == 1 and 4 * tokens * (64 * plan.chunk + 16) + 16_400 <= room


def test_fields_are_those_of_the_source() -> None:
    """In name and order: a struct of the same size could still be shuffled."""
    text = (sources() / "gemv.cu").read_text()
    body = re.sub(r"//.*", "", re.search(r"struct Gemv \{(.*?)\};", text, re.S)[1])
    names = [re.search(r"(\w+)$", part.strip())[1] for part in re.split(r"[;,]", body) if part.strip()]
    assert names == [field[0] for field in cuda.Gemv._fields_]


def test_the_sum_over_experts_is_launched_where_the_rows_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current card, and the rows may lie on another."""
    launcher = pytest.importorskip("sarqc_kernels.w4a16.triton.experts")
    x, nothing, current = torch.ones(2, 3), cast(Any, None), []

    @contextmanager
    def on_device(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(cuda, "on_device", on_device)
    monkeypatch.setattr(cuda, "product", lambda rows, *_, **__: rows)
    monkeypatch.setattr(launcher, "combined", lambda *_: list(current))
    (where,) = cuda.w4a16_experts(x, nothing, nothing, Routing(x, x, x, x))
    assert where is x


def test_says_what_it_does_not_take(generator: torch.Generator) -> None:
    def ready(inputs: int = 128, bits: int = 4, layout: str = "tiles", experts: int = 1) -> RepackedWeight:
        weight = random_quantized(generator, (experts, 8, inputs), 1, bits, scale_dtype=torch.bfloat16)
        return repack(weight.codes, weight.scales, None, bits=bits, layout=layout)

    x = torch.zeros(4, 128, dtype=torch.bfloat16)
    for args, reason in (
        ((x, ready(), 17, False), "17 rows"),
        ((x, ready(experts=3), 25, True), "25 rows"),
        ((x, ready(bits=5), 4, False), "5 bits"),
        ((x, ready(layout="stream"), 4, False), "'stream'"),
        ((x.float(), ready(), 4, False), "x is torch.float32"),
        ((x, ready(inputs=132), 4, False), "132 inputs"),
    ):
        assert reason in (cuda.unsupported_product(*args) or "")

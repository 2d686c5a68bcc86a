"""csrc/columns.cu on a CPU: compiled by the host's compiler, held against the reference.

The same source that nvcc compiles, through `tests/kernels/host_cuda`. What it computes is seen here with one thread to
a block, and that threads of a block agree with several, which run at once and meet at its barriers. What nvcc makes of
it is in test_build.py, and the kernel itself runs on a GPU only (test_columns_backends.py).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sarqc_kernels import fit_grid, quantize_columns
from sarqc_kernels.build import sources
from sarqc_kernels.columns import cuda_impl, panels
from sarqc_kernels.columns.grid import GridRule, Problem
from sarqc_kernels.testing import poisoned_empty, random_gram, upper_factor
from tests.kernels.columns_cases import Case, TorchProducts, assert_alike, exact_inputs

HOST = Path(__file__).parent / "host_cuda"


class HostSteps(TorchProducts):
    def __init__(self, library: ctypes.CDLL, threads: int = 1) -> None:
        self.library, self.threads = library, threads

    def columns(self, work: panels.Work, first: int, last: int, action: panels.Action) -> None:
        assert (
            self.library.sarqc_columns(cuda_impl.launch_arguments(work, first, last, action), self.threads, None) == 0
        )


def compiled(folder: Path) -> ctypes.CDLL:
    """csrc/columns.cu by the host's compiler; skips where there is none."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    made = folder / "columns.so"
    flags = [
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        "-shared",
        "-fPIC",
        "-pthread",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-Werror",
    ]
    include = ["-I", str(HOST), "-I", str(sources())]
    subprocess.run([compiler, *flags, *include, "-o", str(made), str(HOST / "columns.cpp")], check=True)
    return cuda_impl.bind(ctypes.CDLL(str(made)))


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> HostSteps:
    return HostSteps(compiled(tmp_path_factory.mktemp("csrc")))


CASES = [
    Case(1, 7, 48, 16, search=True),
    Case(2, 33, 320, 32, sym=False, search=True, order="group"),
    Case(1, 20, 270, 135, sym=False, search=True, order="group"),
    Case(2, 9, 600, 300, search=True, order="group", dtype=torch.bfloat16),
    Case(1, 40, 400, 40, 3, dtype=torch.bfloat16),
    Case(1, 40, 129, 129, 2, search=True, dtype=torch.float32),
    Case(2, 5, 200, 40, 8, sym=False, given=True, order="any"),
    Case(3, 17, 384, 128, 6, sym=False, search=True, dtype=torch.float32),
    Case(1, 30, 45, 1, 5, sym=False),
    *(Case(1, 12, 256, 64, bits, sym=bits % 2 == 0, search=True) for bits in range(2, 9)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case: Case, steps: HostSteps, generator: torch.Generator) -> None:
    """Random values: next to none lies on a boundary."""
    weight = torch.randn(case.experts, case.rows, case.columns, generator=generator) * 0.02
    factor = upper_factor(random_gram(generator, case.experts, case.columns)).float()
    factor[-1:, 3, 3] = factor[-1:, 3, 3] if case.experts == 1 else float("nan")  # the last of several has no factor
    order = case.processing_order(generator)
    grid = fit_grid(weight, None, **case.rule) if case.given else (None, None)
    want = quantize_columns(weight, factor, order, *grid, **case.rule, backend="reference")
    rule = GridRule(case.bits, case.sym, case.search, case.dtype)
    with poisoned_empty():
        got = panels.quantize(steps, Problem(weight, factor, order, *grid, case.group_size, rule))
    assert_alike(got, want)
    if case.experts > 1:
        assert all(torch.equal(ours[-1], theirs[-1]) for ours, theirs in zip(got, want))


@pytest.mark.parametrize("bits", range(2, 9))
def test_exact_sums_give_the_same_codes(bits: int, steps: HostSteps, generator: torch.Generator) -> None:
    case = Case(2, 19, 300, 50, bits, given=True, order="any")
    weight, factor, scales, zeros = exact_inputs(case, generator)
    order = case.processing_order(generator)
    want = quantize_columns(weight, factor, order, scales, zeros, **case.rule, backend="reference")
    rule = GridRule(bits, True, False, case.dtype)
    got = panels.quantize(steps, Problem(weight, factor, order, scales, zeros, case.group_size, rule))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want))


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[6]], ids=str)
def test_threads_of_a_block_agree(case: Case, steps: HostSteps, generator: torch.Generator) -> None:
    """The same bits by blocks of 7 threads, which share strips of M, as by blocks of one."""
    weight = torch.randn(case.experts, case.rows, case.columns, generator=generator) * 0.02
    factor = upper_factor(random_gram(generator, case.experts, case.columns)).float()
    order = case.processing_order(generator)
    grid = fit_grid(weight, None, **case.rule) if case.given else (None, None)
    rule = GridRule(case.bits, case.sym, case.search, case.dtype)
    problem = Problem(weight, factor, order, *grid, case.group_size, rule)
    alone = panels.quantize(steps, problem)
    together = panels.quantize(HostSteps(steps.library, 7), problem)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(together, alone))

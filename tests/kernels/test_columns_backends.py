"""Every implementation of column quantization, held by the same tests: in Triton's interpreter on a CPU, or on a GPU.

In the interpreter a case costs a second for each few hundred tile operations: few groups, few programs, and a search
only where it is the subject. Sizes beyond that wait for a GPU (`big`).
"""

from __future__ import annotations

import functools
import zlib

import pytest
import torch
from torch import Tensor

from sarqc_kernels import fit_grid, quantize_columns, round_to_grid
from sarqc_kernels.columns import cpu_impl
from sarqc_kernels.testing import Quantized, poisoned_empty, random_gram, upper_factor
from tests.kernels.columns_cases import Case, assert_alike, assert_recurrence, exact_inputs
from tests.kernels.test_columns import objective, permuted, textbook

BACKENDS = ("reference", "cpu", "triton", "cuda")


def unsupported_reason(backend: str) -> str | None:
    return cpu_impl.unsupported_reason() if backend == "cpu" else None


SMALL = [
    Case(1, 7, 32, 16, search=True),
    Case(1, 1, 20, 20, 3, sym=False, search=True, dtype=torch.bfloat16),
    Case(2, 33, 20, 10, sym=False, order="group", dtype=torch.float32),
    Case(1, 20, 146, 73, 2),
    Case(1, 9, 258, 129, sym=False, order="group"),
    Case(1, 5, 150, 150, 8, dtype=torch.float32),
    Case(1, 5, 140, 20, 8, sym=False, given=True, order="any"),
    Case(1, 20, 10, 1, 5, sym=False),  # a symmetric group of one lies half-way between two codes
]
BIG = [
    Case(1, 4096, 4096, 128, search=True),
    Case(1, 1000, 2304, 32, 3, sym=False, search=True, order="group", dtype=torch.bfloat16),
    Case(16, 768, 1536, 64, search=True, order="group"),
    Case(1, 333, 2730, 546, 2, search=True, dtype=torch.float32),
    Case(3, 130, 1001, 1001, 6, sym=False, given=True, order="any"),
]


def problem(case: Case, generator: torch.Generator, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight, Hessian (fp64, as it lies) and order; device: where the Hessian is made."""
    weight = torch.randn(case.experts, case.rows, case.columns, generator=generator) * 0.02
    hessian = random_gram(generator, case.experts, case.columns, device=device).cpu()
    return weight, hessian, case.processing_order(generator)


def solved(case: Case, backend: str, device: str, weight: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
    """quantize_columns on `device`, seen from the CPU; `rest`: factor, order, scales, zeros."""
    given = (tensor if tensor is None else tensor.to(device) for tensor in (weight, *rest))
    with poisoned_empty():
        return tuple(part.cpu() for part in quantize_columns(*given, **case.rule, backend=backend))


@functools.cache  # one core takes long for the large ones: once, not once for each implementation
def inputs_of(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Weight, factor, order, scales and zeros of a problem, on the CPU."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    weight, hessian, order = problem(case, generator, device)
    factor = upper_factor(permuted(hessian, order)).float()
    grid = fit_grid(weight, None, **case.rule) if case.given else (None, None)
    return weight, factor, order, *grid


@functools.cache
def by_the_reference(case: Case, device: str) -> tuple[Tensor, ...]:
    """What the reference makes of a problem on the CPU."""
    return solved(case, "reference", "cpu", *inputs_of(case, device))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_like_the_reference(case: Case, backend: str, device: str) -> None:
    assert_alike(solved(case, backend, device, *inputs_of(case, device)), by_the_reference(case, device))


@pytest.mark.parametrize(
    "case", [SMALL[0], Case(1, 20, 48, 16, 3, sym=False, search=True, order="group"), *BIG], ids=str
)
def test_each_code_is_that_of_its_recurrence(case: Case, backend: str, device: str) -> None:
    """In rows of thousands of columns one code that the last bit of a sum turns turns others behind it, so that two
    right implementations differ in more than a thousandth of all codes."""
    if case in BIG and device == "cpu":
        pytest.skip("too large for the interpreter: runs on a GPU")
    weight, factor, order, scales, zeros = inputs_of(case, device)
    got = solved(case, backend, device, weight, factor, order, scales, zeros)
    assert [part.dtype for part in got] == [torch.uint8, case.dtype, torch.uint8]
    order = None if order is None else order.to(device)
    there = tuple(part.to(device) for part in got)
    assert_recurrence(case, (weight.to(device), factor.to(device).double(), order), there)


@pytest.mark.parametrize("case", [SMALL[0], Case(1, 24, 64, 32, sym=False, order="group")], ids=str)
def test_like_the_textbook_in_fp64(case: Case, backend: str, device: str, generator: torch.Generator) -> None:
    weight, hessian, order = problem(case, generator)
    inner = permuted(hessian, order)
    codes, scales, zeros = solved(case, backend, device, weight, upper_factor(inner).float(), order, None, None)
    lined_up = weight if order is None else weight[:, :, order[0]]
    want = textbook(lined_up[0], inner[0], None, case.rule)
    assert float(((codes if order is None else codes[:, :, order[0]]) == want.codes).float().mean()) >= 0.999
    ours = objective(weight, hessian, Quantized(codes, scales, zeros))
    assert ours == pytest.approx(objective(lined_up, inner, want), rel=1e-3)


@pytest.mark.parametrize("columns", [32, 150])
def test_exact_sums_give_the_same_codes(columns: int, backend: str, device: str, generator: torch.Generator) -> None:
    """No sum rounds, so neither its order nor the tensor cores' formats can show: every code is the same."""
    case = Case(1, 19, columns, columns // 2, 3, given=True, order="any")
    weight, factor, scales, zeros = exact_inputs(case, generator)
    order = case.processing_order(generator)
    want = solved(case, "reference", "cpu", weight, factor, order, scales, zeros)
    got = solved(case, backend, device, weight, factor, order, scales, zeros)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want))


@pytest.mark.parametrize("search", [True, False])
def test_identity_factor_is_plain_rounding(search: bool, backend: str, device: str, generator: torch.Generator) -> None:
    case = Case(1, 5, 32, 16, 3, sym=False, search=search)
    weight = torch.randn(1, 5, 32, generator=generator)
    scales, zeros = fit_grid(weight, None, **case.rule)
    want = round_to_grid(weight, scales, zeros, bits=3), scales, zeros
    identity = torch.eye(32).expand(1, -1, -1)
    for grid in ((None, None), (scales, zeros)):
        got = solved(case, backend, device, weight, identity, None, *grid)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want))


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_an_expert_without_a_factor_is_rounded_alone(
    bad: float, backend: str, device: str, generator: torch.Generator
) -> None:
    case = Case(3, 6, 12, 12)
    weight, hessian, _ = problem(case, generator)
    factor = upper_factor(hessian).float()
    good = solved(case, backend, device, weight, factor, None, None, None)
    factor[1, 5:, 5:] = bad
    got = solved(case, backend, device, weight, factor, None, None, None)
    for expert in (0, 2):
        assert all(torch.equal(ours[expert], theirs[expert]) for ours, theirs in zip(got, good))
    scales, zeros = fit_grid(weight, None, **case.rule)
    want = round_to_grid(weight, scales, zeros, bits=4), scales, zeros
    assert all(torch.equal(ours[1], theirs[1]) for ours, theirs in zip(got, want))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter's numpy, of the row of NaN
def test_rows_and_experts_do_not_see_each_other(backend: str, device: str, generator: torch.Generator) -> None:
    """The same bytes for a row alone, beside others, and in a batch; a row of NaN changes no other."""
    if backend == "reference" and device == "cuda":
        pytest.skip("cuBLAS picks its kernels, and so the order of sums, by the number of rows")
    case = Case(2, 34, 20, 20, sym=False)
    weight, hessian, _ = problem(case, generator)
    factor = upper_factor(hessian).float()
    whole = solved(case, backend, device, weight, factor, None, None, None)
    for expert, rows in ((0, slice(3, 4)), (1, slice(20, 34))):
        part = solved(case, backend, device, weight[expert, None, rows], factor[expert, None], None, None, None)
        assert all(torch.equal(ours[0], theirs[expert, rows]) for ours, theirs in zip(part, whole))
    weight[0, 5] = float("nan")
    spoiled = solved(case, backend, device, weight, factor, None, None, None)
    others = [row for row in range(34) if row != 5]
    assert all(torch.equal(ours[0, others], theirs[0, others]) for ours, theirs in zip(spoiled, whole))
    assert all(torch.equal(ours[1], theirs[1]) for ours, theirs in zip(spoiled, whole))


def test_reads_nothing_beside_its_arguments(backend: str, device: str, generator: torch.Generator) -> None:
    """Sliced views between guard rows and columns of NaN; below its diagonal the factor is NaN too."""
    case = Case(1, 6, 32, 16)
    weight, hessian, _ = problem(case, generator)
    factor = upper_factor(hessian).float()
    want = solved(case, backend, device, weight, factor, None, None, None)
    nan = float("nan")
    factor = factor.masked_fill(torch.ones_like(factor).tril(-1).bool(), nan)
    again = solved(case, backend, device, weight, factor, None, None, None)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, want))
    guarded = torch.full((3, 9, 40), nan, device=device)
    guarded[1:2, 2:8, 5:37] = weight.to(device)
    wide = torch.full((3, 40, 41), nan, device=device)
    wide[1:2, 4:36, 5:37] = factor.to(device)
    kept = guarded.clone(), wide.clone()
    got = solved(case, backend, device, guarded[1:2, 2:8, 5:37], wide[1:2, 4:36, 5:37], None, None, None)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want))
    for before, after in zip(kept, (guarded, wide)):
        assert torch.equal(before.isnan(), after.isnan()) and torch.equal(before.nan_to_num(), after.nan_to_num())


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
def test_nothing_to_do(shape: tuple[int, int, int], backend: str, device: str) -> None:
    case = Case(*shape, 4)
    codes, scales, zeros = solved(case, backend, device, torch.zeros(shape), torch.eye(8).repeat(shape[0], 1, 1),
                                  None, None, None)  # fmt: skip
    assert codes.shape == shape and scales.shape == zeros.shape == (*shape[:2], 2)


def test_opcheck(backend: str, device: str, generator: torch.Generator) -> None:
    case = Case(1, 3, 8, 8)
    weight, hessian, _ = problem(case, generator)
    factor = upper_factor(hessian).float()
    args = (weight.to(device), factor.to(device), None, None, None, 4, 8, True, False, torch.float16, backend)
    torch.library.opcheck(torch.ops.sarqc.quantize_columns.default, args)


@pytest.mark.gpu
def test_beyond_32_bits(backend: str, device: str) -> None:
    """More than 2^31 weights, by experts and by rows; an identity factor, so that plain rounding is the answer."""
    if device == "cpu":
        pytest.skip("needs the memory of a GPU")
    if backend == "reference":
        pytest.skip("it takes some thousand rows at a time: no index is large, and launches are millions")
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GB of free memory")
    for shape in ((5, 120_000, 4096), (1, 530_000, 4096)):
        case = Case(*shape, 4096, given=True)
        weight = torch.randn(shape, device=device)
        scales = torch.full((*shape[:2], 1), 0.25, dtype=torch.float16, device=device)
        zeros = torch.full((*shape[:2], 1), 8, dtype=torch.uint8, device=device)
        factor = torch.eye(4096, device=device).expand(shape[0], -1, -1)
        codes, *_ = quantize_columns(weight, factor, None, scales, zeros, **case.rule, backend=backend)
        for rows in (slice(0, 100), slice(shape[1] - 100, shape[1])):
            want = round_to_grid(weight[:, rows], scales[:, rows], zeros[:, rows], bits=4)
            assert torch.equal(codes[:, rows], want)
        del weight, codes

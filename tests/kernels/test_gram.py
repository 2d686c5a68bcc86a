"""Gram accumulation against float64, by the error bound of a sum; ragged experts; streaming; poison. All backends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sarqc_kernels import ArgumentError, BackendError, gram_accumulate_, symmetrize_
from sarqc_kernels.backend import ENVIRONMENT
from sarqc_kernels.gram import reference
from sarqc_kernels.testing import poisoned_empty, product_bound, uneven_offsets

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Sums = tuple[Tensor, Tensor, Tensor]


def fresh(experts: int, inputs: int, device: str) -> Sums:
    """Sums at zero, with NaN where the operation must not look: above the diagonal."""
    gram = torch.full((experts, inputs, inputs), float("nan"), device=device).triu(1)
    rows = torch.zeros(experts, dtype=torch.int64, device=device)
    return gram, rows, torch.zeros(experts, inputs, device=device)


def whole_numbers(generator: torch.Generator, *shape: int, most: int = 8) -> Tensor:
    """Small whole numbers: their sums of products are exact in fp32 in any order, so results agree bit for bit."""
    return torch.randint(-most, most + 1, shape, generator=generator).float()


def bound(x: Tensor, backend: str) -> Tensor:
    """What |error| of X^T X may be: that of a sum in fp32, and of three tf32 products for fp32 inputs on tensor cores.

    tf32x3: a value is high + low + rest, |low| <= 2^-11 and |rest| <= 2^-21 of it (low is cut to tf32, not always
    rounded). Left out are low x low (2^-22) and two products with a rest (2^-20 together): 2^-19 covers the three.
    Tensor cores may cut bits off where they add, instead of rounding: an eps for each addition, not half, which is
    what `product_bound` has room for.
    """
    exact = x.double()
    split = 2.0**-19 * (exact.abs().T @ exact.abs()) if x.dtype == torch.float32 and backend == "triton" else 0.0
    return product_bound(exact.T, exact) + split


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (150, 129), (257, 576), (130, 272), (700, 48)], ids=str)
def test_one_expert_against_float64(
    shape: tuple[int, int], dtype: torch.dtype, backend: str, device: str, generator: torch.Generator
) -> None:
    x = torch.randn(shape, generator=generator).to(dtype).to(device)
    gram, rows, abs_sum = fresh(1, shape[1], device)
    with poisoned_empty():
        gram_accumulate_(gram, rows, abs_sum, x, None, backend=backend)
    symmetrize_(gram)
    exact = x.double()
    assert torch.equal(gram, gram.mT)
    assert ((gram[0] - exact.T @ exact).abs() <= bound(x, backend)).all()
    assert rows.tolist() == [shape[0]]
    one = torch.ones(1, shape[0], device=device)
    assert ((abs_sum - exact.abs().sum(0)).abs() <= product_bound(one, exact)).all()


@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("inputs", [33, 64])
def test_ragged_rows_go_to_their_expert(
    experts: int, inputs: int, backend: str, device: str, generator: torch.Generator
) -> None:
    x = whole_numbers(generator, 203, inputs).bfloat16().to(device)
    offsets = uneven_offsets(generator, 203, experts).to(device)
    gram, rows, abs_sum = fresh(experts, inputs, device)
    gram_accumulate_(gram, rows, abs_sum, x, offsets, backend=backend)
    cuts = offsets.tolist()
    for expert in range(experts):
        own = x[cuts[expert] : cuts[expert + 1]].double()
        assert torch.equal(gram[expert].tril().double(), (own.T @ own).tril())
        assert torch.equal(abs_sum[expert].double(), own.abs().sum(0))
    assert rows.tolist() == offsets.diff().tolist()
    if experts > 1:
        idle = rows == 0
        assert idle.any() and not gram[idle].tril().any() and not abs_sum[idle].any()


def test_an_expert_without_rows_is_not_touched(backend: str, device: str, generator: torch.Generator) -> None:
    """Not even its NaN and -0.0 change: it is not read and written back."""
    sums = fresh(3, 40, device)
    sums[0][1], sums[2][1] = -0.0, float("nan")
    before = [each[1].clone() for each in sums]
    x = whole_numbers(generator, 20, 40).to(device)
    gram_accumulate_(*sums, x, torch.tensor([0, 11, 11, 20], device=device), backend=backend)
    for each, kept in zip(sums, before):
        assert each[1:2].view(torch.uint8).equal(kept[None].view(torch.uint8))


@pytest.mark.parametrize("inputs", [9, 32])
def test_rows_outside_of_the_offsets_are_not_read(
    inputs: int, backend: str, device: str, generator: torch.Generator
) -> None:
    x = torch.randn(300, inputs, generator=generator)
    x[:3] = x[150:] = float("nan")
    sums = fresh(2, inputs, device)
    gram_accumulate_(*sums, x.to(device), torch.tensor([3, 3, 150], device=device), backend=backend)
    assert symmetrize_(sums[0]).isfinite().all() and sums[2].isfinite().all() and sums[1].tolist() == [0, 147]


def test_memory_around_the_sums_stays(backend: str, device: str, generator: torch.Generator) -> None:
    """Guard rows before and after each output keep their values: nothing is written out of bounds."""
    inputs = 150
    storage = torch.full((3, inputs, inputs), 7.0, device=device)
    rows, abs_sum = torch.full((3,), 7, device=device), torch.full((3, inputs), 7.0, device=device)
    inner = (storage[1:2].zero_(), rows[1:2].zero_(), abs_sum[1:2].zero_())
    x = whole_numbers(generator, 70, inputs).half().to(device)
    gram_accumulate_(*inner, x, None, backend=backend)
    assert torch.equal(inner[0][0].tril(), (x.float().T @ x.float()).tril())
    for each in (storage, rows, abs_sum):
        assert (each[0] == 7).all() and (each[2] == 7).all()


def test_exact_where_sums_are_exact(backend: str, device: str, generator: torch.Generator) -> None:
    """Small whole numbers have exact sums: streaming in parts gives the same bits as one call."""
    x = whole_numbers(generator, 500, 208).half().to(device)
    whole, parts = fresh(1, 208, device), fresh(1, 208, device)
    gram_accumulate_(*whole, x, None, backend=backend)
    for part in x.split(177):
        gram_accumulate_(*parts, part, None, backend=backend)
    symmetrize_(parts[0])
    assert torch.equal(symmetrize_(whole[0])[0].double(), x.double().T @ x.double())
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))


def test_same_input_same_bits(backend: str, device: str, generator: torch.Generator) -> None:
    x = torch.randn(600, 80, generator=generator).to(device)
    offsets = torch.tensor([0, 450, 600], device=device)
    first, second = fresh(2, 80, device), fresh(2, 80, device)
    for sums in (first, second):
        gram_accumulate_(*sums, x, offsets, backend=backend)
    assert all(torch.equal(a.tril() if a.dim() == 3 else a, b.tril() if b.dim() == 3 else b)
               for a, b in zip(first, second))  # fmt: skip


def test_long_inputs_in_several_stretches(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    monkeypatch.setattr(reference, "STRETCH", 1)
    x = whole_numbers(generator, 2500, 12, most=3).bfloat16()
    sums = fresh(1, 12, "cpu")
    gram_accumulate_(*sums, x, None, backend="reference")
    assert torch.equal(symmetrize_(sums[0])[0].double(), x.double().T @ x.double())


def test_wide_dtype_sums(backend: str, device: str) -> None:
    """fp16 activations whose squares overflow fp16 are summed in fp32."""
    x = torch.full((4, 3), 6e4, dtype=torch.float16, device=device)
    sums = fresh(1, 3, device)
    gram_accumulate_(*sums, x, None, backend=backend)
    assert symmetrize_(sums[0]).isfinite().all() and float(sums[0][0, 0, 0]) == pytest.approx(4 * float(x[0, 0]) ** 2)


@pytest.mark.parametrize("first", [5, 16])
def test_strided_activations(first: int, backend: str, device: str, generator: torch.Generator) -> None:
    x = whole_numbers(generator, 60, 80, most=3).to(device)[::2, first : first + 64]
    sums = fresh(1, 64, device)
    gram_accumulate_(*sums, x, None, backend=backend)
    assert torch.equal(symmetrize_(sums[0])[0], x.T @ x)


def test_no_rows_and_no_inputs(backend: str, device: str) -> None:
    for tokens, inputs, who in ((0, 5, backend), (4, 0, None)):  # no input at all: the reference only counts the rows
        sums = fresh(1, inputs, device)
        gram_accumulate_(*sums, torch.zeros(tokens, inputs, device=device), None, backend=who)
        assert not sums[0].tril().any() and sums[1].tolist() == [tokens]


def test_a_cpu_gets_the_reference_unless_asked(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """Triton on a CPU is its interpreter: thousands of times slower, so only by request, and never without a reason."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    x = torch.randn(50, 20, generator=generator)
    unasked, asked = fresh(1, 20, "cpu"), fresh(1, 20, "cpu")
    gram_accumulate_(*unasked, x, None)
    gram_accumulate_(*asked, x, None, backend="reference")
    assert torch.equal(unasked[0].tril(), asked[0].tril())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match=r"triton is not installed|tensors are on the CPU and TRITON_INTERPRET"):
        gram_accumulate_(*asked, x, None, backend="triton")


@pytest.mark.parametrize("inputs", [1, 5, 511, 512, 513, 1100])
def test_symmetrize_copies_lower_over_upper(inputs: int, generator: torch.Generator) -> None:
    lower = torch.randn(2, inputs, inputs, generator=generator).tril()
    gram = lower + torch.full((inputs, inputs), float("nan")).triu(1)
    assert symmetrize_(gram) is gram
    assert torch.equal(gram, lower + lower.tril(-1).mT)


def test_refuses_what_does_not_fit() -> None:
    gram, rows, abs_sum = fresh(2, 4, "cpu")
    x, offsets = torch.zeros(6, 4), torch.tensor([0, 2, 6])
    for broken, words in (
        ((gram.double(), rows, abs_sum, x, offsets), "gram is torch.float64"),
        ((gram, rows.int(), abs_sum, x, offsets), "rows is torch.int32"),
        ((gram, rows, abs_sum[:1], x, offsets), "abs_sum is"),
        ((gram, rows, abs_sum, x.double(), offsets), "x is torch.float64"),
        ((gram, rows, abs_sum, x[:, :3], offsets), "x is"),
        ((gram, rows, abs_sum, x, None), "offsets is None with 2 experts"),
        ((gram, rows, abs_sum, x, offsets[:2]), "offsets is"),
        ((gram, rows, abs_sum, x, torch.tensor([0, 7, 7])), "do not cut 6 rows"),
        ((gram, rows, abs_sum, x, torch.tensor([4, 2, 6])), "do not cut 6 rows"),
        ((gram, rows, abs_sum, x.to("meta"), offsets), "x is on meta"),
    ):
        with pytest.raises(ArgumentError, match=words):
            gram_accumulate_(*broken)
    assert not gram.tril().any() and not rows.any()


def test_opcheck(backend: str, device: str, generator: torch.Generator) -> None:
    x = torch.randn(12, 5, generator=generator).to(device)
    for experts, offsets in ((1, None), (2, torch.tensor([0, 0, 12], device=device))):
        gram, rows, abs_sum = fresh(experts, 5, device)
        sums = (gram.nan_to_num_(), rows, abs_sum)  # opcheck compares whole tensors
        torch.library.opcheck(torch.ops.sarqc.gram_accumulate_.default, (*sums, x, offsets, backend))

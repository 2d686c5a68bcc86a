"""Gram accumulation against float64, by the error bound of a sum; ragged experts; streaming; poison."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sarqc_kernels import ArgumentError, gram_accumulate_, symmetrize_
from sarqc_kernels.gram import reference
from sarqc_kernels.testing import poisoned_empty, product_bound, uneven_offsets


def fresh(experts: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums at zero, with NaN where the operation must not look: above the diagonal."""
    gram = torch.full((experts, inputs, inputs), float("nan")).triu(1)
    return gram, torch.zeros(experts, dtype=torch.int64), torch.zeros(experts, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (300, 129), (257, 576), (3000, 40)], ids=str)
def test_one_expert_against_float64(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(shape, generator=generator).to(dtype)
    gram, rows, abs_sum = fresh(1, shape[1])
    with poisoned_empty():
        gram_accumulate_(gram, rows, abs_sum, x, None)
    symmetrize_(gram)
    exact = x.double()
    assert torch.equal(gram, gram.mT)
    assert ((gram[0] - exact.T @ exact).abs() <= product_bound(exact.T, exact)).all()
    assert rows.tolist() == [shape[0]]
    one = torch.ones(1, shape[0])
    assert ((abs_sum - exact.abs().sum(0)).abs() <= product_bound(one, exact)).all()


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_ragged_rows_go_to_their_expert(experts: int, generator: torch.Generator) -> None:
    x = torch.randn(101, 33, generator=generator).bfloat16()
    offsets = uneven_offsets(generator, 101, experts)
    gram, rows, abs_sum = fresh(experts, 33)
    gram_accumulate_(gram, rows, abs_sum, x, offsets)
    for expert in range(experts):
        alone = fresh(1, 33)
        gram_accumulate_(*alone, x[offsets[expert] : offsets[expert + 1]], None)
        assert torch.equal(gram[expert].tril(), alone[0][0].tril())
        assert torch.equal(abs_sum[expert], alone[2][0])
    assert rows.tolist() == offsets.diff().tolist()
    if experts > 1:
        idle = rows == 0
        assert idle.any() and not gram[idle].tril().any() and not abs_sum[idle].any()


def test_rows_outside_of_the_offsets_are_not_read(generator: torch.Generator) -> None:
    x = torch.randn(20, 9, generator=generator)
    x[:3] = x[15:] = float("nan")
    sums = fresh(2, 9)
    gram_accumulate_(*sums, x, torch.tensor([3, 3, 15]))
    assert symmetrize_(sums[0]).isfinite().all() and sums[1].tolist() == [0, 12]


def test_exact_where_sums_are_exact(generator: torch.Generator) -> None:
    """Small whole numbers have exact sums: streaming in parts gives the same bits as one call."""
    x = torch.randint(-8, 9, (500, 200), generator=generator).half()
    whole, parts = fresh(1, 200), fresh(1, 200)
    gram_accumulate_(*whole, x, None)
    for part in x.split(77):
        gram_accumulate_(*parts, part, None)
    symmetrize_(parts[0])
    assert torch.equal(symmetrize_(whole[0])[0].double(), x.double().T @ x.double())
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))


def test_long_inputs_in_several_stretches(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    monkeypatch.setattr(reference, "STRETCH", 1)
    x = torch.randint(-3, 4, (2500, 12), generator=generator).bfloat16()
    sums = fresh(1, 12)
    gram_accumulate_(*sums, x, None)
    assert torch.equal(symmetrize_(sums[0])[0].double(), x.double().T @ x.double())


def test_wide_dtype_sums(generator: torch.Generator) -> None:
    """fp16 activations whose squares overflow fp16 are summed in fp32."""
    x = torch.full((4, 3), 6e4, dtype=torch.float16)
    sums = fresh(1, 3)
    gram_accumulate_(*sums, x, None)
    assert symmetrize_(sums[0]).isfinite().all() and float(sums[0][0, 0, 0]) == pytest.approx(4 * float(x[0, 0]) ** 2)


def test_strided_activations(generator: torch.Generator) -> None:
    x = torch.randint(-3, 4, (60, 80), generator=generator).float()[::2, 5:70]
    sums = fresh(1, 65)
    gram_accumulate_(*sums, x, None)
    assert torch.equal(symmetrize_(sums[0])[0], x.T @ x)


@pytest.mark.parametrize("inputs", [1, 5, 511, 512, 513, 1100])
def test_symmetrize_copies_lower_over_upper(inputs: int, generator: torch.Generator) -> None:
    lower = torch.randn(2, inputs, inputs, generator=generator).tril()
    gram = lower + torch.full((inputs, inputs), float("nan")).triu(1)
    assert symmetrize_(gram) is gram
    assert torch.equal(gram, lower + lower.tril(-1).mT)


def test_refuses_what_does_not_fit() -> None:
    gram, rows, abs_sum = fresh(2, 4)
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


def test_opcheck(generator: torch.Generator) -> None:
    x = torch.randn(12, 5, generator=generator)
    for experts, offsets in ((1, None), (2, torch.tensor([0, 0, 12]))):
        gram, rows, abs_sum = fresh(experts, 5)
        sums = (gram.nan_to_num_(), rows, abs_sum)  # opcheck compares whole tensors
        torch.library.opcheck(torch.ops.sarqc.gram_accumulate_.default, (*sums, x, offsets))

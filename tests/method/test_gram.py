import pytest
import torch
from torch import Tensor

from sarqc.method.gram import Gram, Statistics

OFFSETS = torch.tensor([0, 5, 5, 17])


def exact(x: Tensor) -> Tensor:
    return x.double().T @ x.double()


def test_hessian_is_the_mean_outer_product_of_each_expert(generator):
    x = torch.randn(17, 24, generator=generator)
    gram = Gram.zeros(3, 24)
    gram.add(x, OFFSETS)
    hessian = gram.second_moment()
    assert torch.equal(hessian, hessian.mT)
    assert torch.equal(gram.rows, torch.tensor([5, 0, 12]))
    assert not hessian[1].any() and not gram.abs_mean()[1].any()
    torch.testing.assert_close(hessian[2].double(), exact(x[5:]) / 12, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gram.abs_mean()[0], x[:5].abs().mean(0), rtol=1e-5, atol=1e-6)


def test_reading_does_not_change_what_is_remembered(generator):
    gram = Gram.zeros(1, 8)
    gram.add(torch.randn(6, 8, generator=generator))
    before = gram.sum.clone()
    gram.second_moment()
    assert torch.equal(gram.sum, before)


def test_merged_halves_are_the_whole(generator):
    # Whole numbers, so that sums are exact in any order.
    x = torch.randint(-4, 5, (30, 16), generator=generator).float()
    whole, left, right = Gram.zeros(1, 16), Gram.zeros(1, 16), Gram.zeros(1, 16)
    whole.add(x)
    left.add(x[:11])
    right.add(x[11:])
    left.merge(right)
    assert torch.equal(left.second_moment(), whole.second_moment())
    assert torch.equal(left.rows, whole.rows)
    assert torch.equal(left.abs_sum, whole.abs_sum)


def test_folds_stay_apart_and_total_leaves_them_alone(generator):
    x = torch.randint(-4, 5, (20, 8), generator=generator).float()
    statistics = Statistics.zeros(1, 8, folds=2)
    statistics.add(x[:8], fold=0)
    statistics.add(x[8:], fold=1)
    total = statistics.total()
    assert total.rows.item() == 20
    assert [fold.rows.item() for fold in statistics.folds] == [8, 12]
    assert torch.equal(total.second_moment()[0], (x.T @ x) / 20)


@pytest.mark.parametrize(("experts", "inputs"), [(1, 48), (3, 130), (2, 700)])
def test_the_energy_of_rows_is_read_from_the_lower_triangle(experts, inputs, generator):
    x = torch.randn(60, inputs, generator=generator)
    offsets = torch.linspace(0, 60, experts + 1).long()
    gram = Gram.zeros(experts, inputs)
    gram.add(x, offsets if experts > 1 else None)
    gram.sum.masked_fill_(torch.ones(inputs, inputs).triu(1).bool(), float("nan"))
    rows = torch.randn(experts, 5, inputs, generator=generator)
    actual = gram.energy(rows)
    for expert in range(experts):
        outputs = x[offsets[expert] : offsets[expert + 1]].double() @ rows[expert].double().T
        assert actual[expert] == pytest.approx(float(outputs.square().sum()), rel=1e-5)
    assert actual.dtype == torch.float64

import pytest
import torch

from sarqc.errors import ArgumentError
from sarqc.method.order import column_order
from sarqc.method.statistics import Gram
from sarqc.method.strength import STRONGEST, WEAKEST, choose
from sarqc.spec import SolveSpec


def test_static_order_sorts_and_none_does_not(generator):
    diagonal = torch.rand(2, 12, generator=generator)
    order = column_order(diagonal, 4, "static")
    assert column_order(diagonal, 4, "none") is None
    sorted_diagonal = diagonal.gather(1, order)
    assert (sorted_diagonal[:, :-1] >= sorted_diagonal[:, 1:]).all()


def test_group_order_keeps_groups_together_and_sorts_both_levels(generator):
    diagonal = torch.rand(3, 24, generator=generator)
    order = column_order(diagonal, 4, "group")
    assert torch.equal(order.sort(dim=1).values, torch.arange(24).expand(3, -1))
    groups = (order // 4).unflatten(1, (6, 4))
    assert (groups == groups[..., :1]).all()
    ordered = diagonal.gather(1, order).unflatten(1, (6, 4))
    assert (ordered[..., :-1] >= ordered[..., 1:]).all()
    assert (ordered.sum(-1)[:, :-1] >= ordered.sum(-1)[:, 1:]).all()


def test_ties_keep_their_order():
    assert torch.equal(column_order(torch.ones(1, 8), 4, "group")[0], torch.arange(8))


def gram_with_rows(*rows: int) -> Gram:
    gram = Gram.zeros(len(rows), 512)
    gram.rows += torch.tensor(rows)
    return gram


def test_a_given_strength_is_taken_as_it_is():
    assert torch.equal(choose(gram_with_rows(5, 0), SolveSpec(strength=0.7)), torch.tensor([0.7, 0.7]))


def test_fewer_rows_give_a_stronger_pull_within_bounds():
    chosen = choose(gram_with_rows(0, 64, 512, 4096, 10**9), SolveSpec())
    assert chosen[0] == STRONGEST and chosen[-1] == pytest.approx(WEAKEST)
    assert (chosen[:-1] >= chosen[1:]).all() and chosen[1] > chosen[3]


def test_energy_is_held_harder_than_iso():
    gram = gram_with_rows(2048)
    assert choose(gram, SolveSpec(saliency="energy")) == pytest.approx(3 * choose(gram, SolveSpec(saliency="iso")))


@pytest.mark.parametrize(
    "values", [dict(strength=-1), dict(saliency="loud"), dict(saliency="power:x"), dict(grid="fine")]
)
def test_a_spec_refuses_what_it_does_not_know(values):
    with pytest.raises(ArgumentError, match=next(iter(values))):
        SolveSpec(**values)

import pytest
import torch

from sarqc.config import MethodConfig
from sarqc.errors import ArgumentError
from sarqc.method.gptq import column_order


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


@pytest.mark.parametrize(
    "values", [dict(reg_lambda=-1), dict(saliency="loud"), dict(saliency="power:x"), dict(scales="fine")]
)
def test_a_spec_refuses_what_it_does_not_know(values):
    with pytest.raises(ArgumentError, match=next(iter(values))):
        MethodConfig(**values)

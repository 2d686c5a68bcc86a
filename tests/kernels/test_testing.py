"""The test material itself: a bound that cannot fail proves nothing."""

from __future__ import annotations

import pytest
import torch

from sarqc_kernels.testing import (
    poisoned_empty,
    product_bound,
    random_gram,
    relative_error,
    uneven_offsets,
    upper_factor,
)


@pytest.mark.parametrize("experts", [1, 2, 3, 17])
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_offsets_cut_all_tokens_and_leave_one_expert_empty(
    experts: int, tokens: int, generator: torch.Generator
) -> None:
    for _ in range(20):
        offsets = uneven_offsets(generator, tokens, experts)
        assert offsets.dtype == torch.int64 and offsets[0] == 0 and offsets[-1] == tokens
        assert (offsets.diff() >= 0).all()
        assert experts == 1 or (offsets.diff() == 0).any()


def test_grams_have_factors(generator: torch.Generator) -> None:
    gram = random_gram(generator, 3, 40)
    factor = upper_factor(gram)
    assert torch.equal(factor, factor.triu()) and (factor.diagonal(dim1=1, dim2=2) > 0).all()
    assert relative_error(factor @ factor.mT, gram) < 1e-12


def test_the_bound_holds_for_sums_and_fails_for_rounded_inputs(generator: torch.Generator) -> None:
    a, b = torch.randn(20, 300, generator=generator), torch.randn(300, 30, generator=generator)
    exact = a.double() @ b.double()
    assert ((a @ b - exact).abs() <= product_bound(a, b)).all()
    assert not ((a.bfloat16().float() @ b - exact).abs() <= product_bound(a, b)).all()


def test_poison_covers_every_empty_and_is_taken_back() -> None:
    plain = torch.empty, torch.empty_like, torch.Tensor.new_empty
    with pytest.raises(KeyError), poisoned_empty():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
        assert torch.ones(2).new_empty((2, 2)).isnan().all()
        assert (torch.empty(2, dtype=torch.uint8) == 255).all()
        raise KeyError
    assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == plain

"""Products whose sums have one order: equal rows give equal bits beside any others, and the sums are right."""

from __future__ import annotations

import pytest
import torch

from sarqc_kernels.products import columns_product
from sarqc_kernels.testing import product_bound

WIDTHS = range(1, 301)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("width", [1, 2, 13, 16, 112, 128])
@pytest.mark.parametrize("depth", [1, 16, 300])
def test_columns_do_not_depend_on_those_beside(width: int, depth: int, generator: torch.Generator) -> None:
    left = torch.randn(depth, width, generator=generator)
    right = torch.randn(depth, 300, generator=generator)
    whole = columns_product(left, right)
    for count in WIDTHS:
        first = (300 - count) // 2
        part = columns_product(left, right[:, first : first + count].contiguous())
        assert torch.equal(part, whole[:, first : first + count]), count
    exact = left.double().T @ right.double()
    assert ((whole - exact).abs() <= product_bound(left.T, right)).all()

"""Products whose sums have one order: equal rows give equal bits beside any others, and the sums are right."""

from __future__ import annotations

import pytest
import torch

from sarqc_kernels.products import columns_product, rows_product, solve_columns, solve_rows
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


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("columns", "out"), [(1, 1), (64, 64), (300, 300), (64, 300), (48, 2)])
def test_rows_do_not_depend_on_those_beside(columns: int, out: int, generator: torch.Generator) -> None:
    rows = torch.randn(1, 300, columns, generator=generator)
    matrix = torch.randn(1, columns, out, generator=generator)
    whole = rows_product(rows, matrix)
    for count in WIDTHS:
        first = (300 - count) // 2
        assert torch.equal(rows_product(rows[:, first : first + count], matrix), whole[:, first : first + count]), count
    assert ((whole - rows.double() @ matrix.double()).abs() <= product_bound(rows[0], matrix[0])).all()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size", [1, 2, 48, 129])
def test_solved_rows_and_columns_do_not_depend_on_those_beside(size: int, generator: torch.Generator) -> None:
    upper = torch.randn(1, size, size, generator=generator).triu(1) / size + torch.eye(size)
    rows = torch.randn(1, 300, size, generator=generator)
    by_rows, by_columns = solve_rows(upper, rows), solve_columns(upper[0].T, rows[0].T.contiguous())
    for count in WIDTHS:
        at = slice((300 - count) // 2, (300 - count) // 2 + count)
        assert torch.equal(solve_rows(upper, rows[:, at]), by_rows[:, at]), count
        assert torch.equal(solve_columns(upper[0].T, rows[0, at].T.contiguous()), by_columns[:, at]), count
    exact = torch.linalg.solve_triangular(upper.double(), rows.double(), upper=True, left=False)
    assert torch.allclose(by_rows.double(), exact, atol=1e-5) and torch.allclose(
        by_columns.T.double(), exact[0], atol=1e-5
    )


@pytest.mark.parametrize("rows", [1, 18, 64, 100])
def test_experts_do_not_depend_on_those_beside(rows: int, generator: torch.Generator) -> None:
    part, matrix = torch.randn(5, rows, 48, generator=generator), torch.randn(5, 48, 48, generator=generator)
    upper = matrix.triu(1) / 48 + torch.eye(48)
    product, solved = rows_product(part, matrix), solve_rows(upper, part)
    for expert in range(5):
        one = slice(expert, expert + 1)
        assert torch.equal(rows_product(part[one], matrix[one]), product[one])
        assert torch.equal(solve_rows(upper[one], part[one]), solved[one])

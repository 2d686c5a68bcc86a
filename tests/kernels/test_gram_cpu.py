"""csrc/gram_cpu.cpp: packing and blocks against fp64 in plain C++, and the same by AMX where there is AMX."""

from __future__ import annotations

import pytest
import torch

from sarqc_kernels import cpu_build
from sarqc_kernels.errors import BackendError
from sarqc_kernels.gram import cpu_impl
from sarqc_kernels.testing import product_bound


@pytest.fixture(params=(cpu_impl.PORTABLE, cpu_impl.TILES), ids=("portable", "tiles"))
def kind(request: pytest.FixtureRequest) -> int:
    """A way to multiply that this machine has."""
    try:
        cpu_build.library("gram_cpu", gram=cpu_impl.Call)
    except BackendError as error:
        pytest.skip(str(error))
    if request.param == cpu_impl.TILES and (reason := cpu_impl.unsupported_reason()):
        pytest.skip(reason)
    return request.param


def bf16(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator).bfloat16()


@pytest.mark.parametrize("shape", [(1, 1), (33, 16), (150, 129), (700, 48), (64, 65)], ids=str)
def test_the_lower_triangle_against_float64(shape, kind, generator):
    x = bf16(generator, shape[0], shape[1] + 3)[:, :-3]  # rows further apart than they are long
    gram, rows, abs_sum = (
        torch.zeros(1, shape[1], shape[1]),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, shape[1]),
    )
    cpu_impl.gram_accumulate_(gram, rows, abs_sum, x, None, kind)
    exact = x.double()
    error = (gram[0] - exact.T @ exact).abs()
    assert (error <= product_bound(exact.T, exact))[torch.ones_like(gram[0]).tril().bool()].all()
    assert ((abs_sum - exact.abs().sum(0)).abs() <= product_bound(torch.ones(1, len(x)), exact)).all()
    assert rows.tolist() == [shape[0]]


def test_experts_gain_their_own_rows(kind, generator):
    x, offsets = bf16(generator, 90, 40), torch.tensor([0, 0, 50, 90])
    sums = torch.zeros(3, 40, 40), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 40)
    cpu_impl.gram_accumulate_(*sums, x, offsets, kind)
    exact = x[50:].double()
    assert ((sums[0][2] - exact.T @ exact).tril().abs() <= product_bound(exact.T, exact)).all()
    assert not sums[0][0].any() and sums[1].tolist() == [0, 50, 40]


def test_a_cross_product_against_float64(kind, generator):
    residual, x = bf16(generator, 600, 70), bf16(generator, 600, 35)
    cross = torch.ones(70, 35)
    cpu_impl.cross_gram_accumulate_(cross, residual, x, kind)
    exact = residual.double(), x.double()
    assert ((cross - 1 - exact[0].T @ exact[1]).abs() <= product_bound(exact[0].T, exact[1]) + 2.0**-22).all()


def test_parts_make_no_difference(kind, generator, monkeypatch):
    x = bf16(generator, 70, 200)
    items = []
    for parts in (1, 2, 3):
        monkeypatch.setattr(cpu_impl, "SHARED_WORK", 0)
        monkeypatch.setattr(torch, "get_num_threads", lambda parts=parts: parts)
        cross, gram, abs_sum = torch.zeros(200, 200), torch.zeros(1, 200, 200), torch.zeros(1, 200)
        cpu_impl.cross_gram_accumulate_(cross, x, x, kind)
        cpu_impl.gram_accumulate_(gram, torch.zeros(1, dtype=torch.int64), abs_sum, x, None, kind)
        items.append(torch.stack([cross, gram[0].tril(), abs_sum.expand(200, -1)]))
    assert torch.equal(items[0], items[1]) and torch.equal(items[0], items[2])


def test_other_activations_are_left_to_the_reference():
    sums = torch.zeros(1, 4, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4)
    assert "float32" in (cpu_impl.gram_unsupported(*sums, torch.ones(2, 4), None) or "")
    transposed = torch.ones(4, 2, dtype=torch.bfloat16).T
    assert "side by side" in (cpu_impl.cross_unsupported(torch.zeros(4, 4), transposed, transposed) or "")

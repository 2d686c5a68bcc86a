"""The cross-Gram: against float64 with the bound of its dtypes, exactly on whole numbers, and what it must not read."""

from __future__ import annotations

import pytest
import torch

from sarqc_kernels import ArgumentError, cross_gram_accumulate_
from sarqc_kernels.gram import cross
from sarqc_kernels.gram.config import FLUSH
from sarqc_kernels.testing import product_bound

KINDS = [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float16, torch.float16),
         (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)]  # fmt: skip


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(70, 33, 50), (1, 1, 1), (64, 130, 16)], ids=str)
def test_within_the_bound_of_float64(kinds, shape, backend: str, device: str, generator: torch.Generator) -> None:
    """Sums of T products in fp32; of a residual in fp32 beside 16-bit inputs 2^-16 may be lost, which is 2^7 eps."""
    tokens, outputs, inputs = shape
    residual = torch.randn(tokens, outputs, generator=generator).to(kinds[0])
    x = torch.randn(tokens, inputs, generator=generator).to(kinds[1])
    start = torch.randn(outputs, inputs, generator=generator)
    got = start.clone().to(device)
    cross_gram_accumulate_(got, residual.to(device), x.to(device), backend=backend)
    exact = start.double() + residual.double().T @ x.double()
    bound = product_bound(residual.float().T, x.float()) * (1 + 200 / tokens) + 4 * start.abs().double() * 2**-23
    assert ((got.cpu().double() - exact).abs() <= bound).all()


def test_whole_numbers_are_exact_over_flushes(backend: str, device: str, generator: torch.Generator) -> None:
    tokens = FLUSH + 45
    residual = torch.randint(-3, 4, (tokens, 20), generator=generator).float()
    x = torch.randint(-3, 4, (tokens, 36), generator=generator).bfloat16()
    got = torch.ones(20, 36, device=device)
    cross_gram_accumulate_(got, residual.to(device), x.to(device), backend=backend)
    assert torch.equal(got.cpu(), residual.T @ x.float() + 1)


def test_views_and_nothing_beside_them(backend: str, device: str, generator: torch.Generator) -> None:
    residual, x = torch.full((12, 30), float("nan")), torch.full((12, 40), float("nan"))
    residual[2:9, 5:25], x[2:9, 3:19] = torch.randn(7, 20, generator=generator), 1.0
    got = torch.zeros(20, 16, device=device)
    cross_gram_accumulate_(got, residual.to(device)[2:9, 5:25], x.to(device)[2:9, 3:19], backend=backend)
    want = residual[2:9, 5:25].sum(0)[:, None].expand(20, 16)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)


def test_no_rows_change_nothing(backend: str, device: str) -> None:
    got = torch.ones(3, 4, device=device)
    cross_gram_accumulate_(got, torch.zeros(0, 3, device=device), torch.zeros(0, 4, device=device), backend=backend)
    assert torch.equal(got.cpu(), torch.ones(3, 4))


def test_refuses_what_does_not_fit() -> None:
    total, residual, x = torch.zeros(3, 4), torch.zeros(5, 3), torch.zeros(5, 4)
    for args, words in (
        ((total.half(), residual, x), "cross is torch.float16"),
        ((total, residual[:, :2], x), "residual is"),
        ((total, residual[:4], x), "residual is"),
        ((total, residual, x.double()), "x is torch.float64"),
        ((total, residual.to("meta"), x), "residual is on meta"),
    ):
        with pytest.raises(ArgumentError, match=words):
            cross_gram_accumulate_(*args)


def test_opcheck(backend: str, device: str) -> None:
    args = (torch.zeros(3, 4, device=device), torch.ones(5, 3, device=device), torch.ones(5, 4, device=device))
    torch.library.opcheck(cross._cross_gram_accumulate_, (*args, backend))

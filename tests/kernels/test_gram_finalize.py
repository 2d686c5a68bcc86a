"""The regularised matrix out of the sums: against its definition in float64, symmetry, poison. All backends."""

from __future__ import annotations

import pytest
import torch

from sarqc_kernels import ArgumentError
from sarqc_kernels.gram import gram_finalize, reference
from sarqc_kernels.testing import poisoned_empty

EPS = torch.finfo(torch.float32).eps


def sums(generator: torch.Generator, experts: int, inputs: int, device: str):
    """A Gram with NaN above the diagonal, as accumulation leaves it, and what regularises it."""
    gram = torch.randn(experts, inputs, inputs, generator=generator).tril() * 100
    gram.diagonal(dim1=1, dim2=2).abs_()
    gram += torch.full((inputs, inputs), float("nan")).triu(1)
    rows = torch.randint(1, 1000, (experts,), generator=generator)
    saliency, reg_lambda = torch.rand(experts, inputs, generator=generator), torch.rand(experts, generator=generator)
    return tuple(each.to(device) for each in (gram, rows, saliency, reg_lambda))


@pytest.mark.parametrize("inputs", [1, 5, 64, 130, 192])
@pytest.mark.parametrize("experts", [1, 3])
def test_against_the_definition(
    experts: int, inputs: int, backend: str, device: str, generator: torch.Generator
) -> None:
    gram, rows, saliency, reg_lambda = sums(generator, experts, inputs, device)
    kept = gram.clone()
    with poisoned_empty():
        out = gram_finalize(gram, rows, saliency, reg_lambda, 0.01, backend=backend)
    assert torch.equal(gram.nan_to_num(7.0), kept.nan_to_num(7.0))
    assert torch.equal(out, out.mT)
    lower = gram.tril() / rows[:, None, None]
    assert torch.equal(out.tril(-1), lower.tril(-1))  # one rounding, so the same bits
    diagonal = lower.double().diagonal(dim1=1, dim2=2)
    exact = diagonal + reg_lambda.double()[:, None] * saliency.double() + 0.01 * diagonal.mean(1, keepdim=True)
    # every term is positive: the sum of K terms for the mean, a product or quotient, two additions round
    error = (out.diagonal(dim1=1, dim2=2) - exact).abs()
    assert (error <= (4 + 0.01 * inputs) * EPS * exact).all()


def test_an_expert_without_rows_gets_the_floor(backend: str, device: str) -> None:
    """No mean to be relative to: it counts as 1, so the matrix has a factor."""
    zero = torch.zeros(2, 40, 40, device=device)
    rows, saliency = torch.zeros(2, dtype=torch.int64, device=device), torch.ones(2, 40, device=device)
    out = gram_finalize(zero, rows, saliency, torch.tensor([0.0, 2.0], device=device), 0.5, backend=backend)
    eye = torch.eye(40, device=device)
    assert torch.equal(out, torch.stack([0.5 * eye, 2.5 * eye]))


def test_backends_agree(backend: str, device: str, generator: torch.Generator) -> None:
    arguments = sums(generator, 2, 100, device)
    known = reference.gram_finalize(*arguments, 0.02)
    assert torch.allclose(gram_finalize(*arguments, 0.02, backend=backend), known, rtol=8 * EPS, atol=0)


def test_refuses_what_does_not_fit(generator: torch.Generator) -> None:
    gram, rows, saliency, reg_lambda = sums(generator, 2, 6, "cpu")
    for broken, words in (
        ((gram.half(), rows, saliency, reg_lambda), "gram is torch.float16"),
        ((gram[:, :5], rows, saliency, reg_lambda), "gram is"),
        ((gram, rows.int(), saliency, reg_lambda), "rows is torch.int32"),
        ((gram, rows, saliency[:1], reg_lambda), "saliency is"),
        ((gram, rows, saliency, reg_lambda[:, None]), "reg_lambda is"),
        ((gram, rows, saliency, reg_lambda.to("meta")), "reg_lambda is on meta"),
    ):
        with pytest.raises(ArgumentError, match=words):
            gram_finalize(*broken, 0.0)


def test_opcheck(backend: str, device: str, generator: torch.Generator) -> None:
    gram, *rest = sums(generator, 2, 12, device)
    torch.library.opcheck(torch.ops.sarqc.gram_finalize.default, (gram.nan_to_num(), *rest, 0.1, backend))

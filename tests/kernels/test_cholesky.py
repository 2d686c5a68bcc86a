"""Factors of Hessians: M M^T is H as near as torch's own factor, M is upper triangular, and failures are told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sarqc_kernels import ArgumentError, cholesky_upper
from sarqc_kernels.device import Device
from sarqc_kernels.gram import cholesky
from sarqc_kernels.testing import relative_error

SIZE = 16  # of a block in the interpreter, which pays by the step; a GPU's tensor cores take none so small


def factor_of(hessian: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return cholesky_upper(hessian, backend=backend)
    implementation = pytest.importorskip("sarqc_kernels.gram.cholesky_impl")
    return implementation.cholesky_upper(hessian, SIZE if hessian.is_cpu else None)


def hessians(generator: torch.Generator, experts: int, inputs: int) -> Tensor:
    """Of correlated inputs, with a tenth of the mean on the diagonal."""
    x = torch.randn(experts, 3 * inputs, inputs, generator=generator).cumsum(-1)
    gram = x.mT @ x / len(x[0])
    return gram + 0.1 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(inputs)


@pytest.mark.parametrize(("experts", "inputs"), [(3, 40), (1, 16), (2, 1), (1, 33), (2, 100)])
def test_the_product_of_the_factor_is_the_matrix(
    experts: int, inputs: int, backend: str, device: str, generator: torch.Generator
) -> None:
    """Three TF32 products keep 21 of the 24 bits of fp32: eight times what torch's loses is allowed.

    Of a small matrix torch loses almost nothing, so some units of the last place are allowed beside it: tensor cores
    cut sums off, and tiles are multiplied by an inverse. One TF32 product would lose 8e-4 and more.
    """
    hessian = hessians(generator, experts, inputs)
    actual, info = factor_of(hessian.to(device), backend)
    assert not info.any() and torch.equal(actual, actual.triu()) and (actual.diagonal(dim1=1, dim2=2) > 0).all()
    exact = torch.linalg.cholesky(hessian.double().flip(-1, -2)).flip(-1, -2)
    own = torch.linalg.cholesky(hessian.flip(-1, -2)).flip(-1, -2)
    assert relative_error(actual.cpu(), exact) <= 8 * relative_error(own, exact) + 1e-6
    product = actual.cpu().double() @ actual.cpu().double().mT
    assert relative_error(product, hessian.double()) < 1e-6


def test_a_wide_matrix_is_factored_by_panels(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to the exact factor as LAPACK's, the last panel narrower than the others, each matrix as if alone."""
    hessian = hessians(generator, 2, 150)
    by_lapack, _ = cholesky_upper(hessian, backend="reference")
    monkeypatch.setattr(cholesky, "PANELS_FROM", 100)
    monkeypatch.setattr(cholesky, "PANEL", 64)
    actual, info = cholesky_upper(hessian, backend="reference")
    alone, _ = cholesky_upper(hessian[1:], backend="reference")
    exact = torch.linalg.cholesky(hessian.double().flip(-1, -2)).flip(-1, -2)
    assert not info.any() and torch.equal(actual, actual.triu()) and torch.equal(actual[1:], alone)
    assert relative_error(actual, exact) <= 2 * relative_error(by_lapack, exact)
    hessian[0, 20, 20] = -1.0
    _, info = cholesky_upper(hessian, backend="reference")
    assert (info != 0).tolist() == [True, False]


def test_one_failure_leaves_the_others(backend: str, device: str, generator: torch.Generator) -> None:
    hessian = hessians(generator, 3, 24)
    hessian[1, 20, 20] = -1.0
    hessian[2, 3] = hessian[2, :, 3] = float("nan")
    result, info = factor_of(hessian.to(device), backend)
    assert (info != 0).tolist() == [False, True, True]
    assert relative_error(result[0].cpu() @ result[0].cpu().T, hessian[0].double()) < 1e-5


def test_many_small_matrices_get_a_program_each() -> None:
    """By counting: 128 experts yes; a dense layer, and eight experts of 4096 inputs, no."""
    h200 = Device(90, 132)
    assert (
        cholesky.is_faster(128, 2048, h200)
        and cholesky.is_faster(128, 768, h200)
        and cholesky.is_faster(64, 4096, h200)
    )
    assert (
        not cholesky.is_faster(1, 2048, h200)
        and not cholesky.is_faster(8, 4096, h200)
        and not cholesky.is_faster(1, 14336, h200)
    )


def test_refuses_what_does_not_fit() -> None:
    for wrong in (torch.zeros(3, 3), torch.zeros(1, 3, 4), torch.zeros(1, 3, 3).double()):
        with pytest.raises(ArgumentError, match="hessian is"):
            cholesky_upper(wrong)
    assert cholesky_upper(torch.zeros(0, 3, 3))[0].shape == (0, 3, 3)


def test_opcheck(device: str, generator: torch.Generator) -> None:
    torch.library.opcheck(cholesky._cholesky_upper, (hessians(generator, 2, 5).to(device), "reference"))

import pytest
import torch
from torch import Tensor

from sarqc.config import MethodConfig
from sarqc.errors import NumericError
from sarqc.method.gram import Gram
from sarqc.method.hessian import Objective, factor, saliency


def spd(experts: int, size: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(experts, 3 * size, size, generator=generator) * torch.logspace(-1, 1, size)
    return x.mT @ x / x.shape[1]


def gram_of(hessian: Tensor, rows: int = 1) -> Gram:
    experts, size = hessian.shape[:2]
    return Gram(hessian * max(rows, 1), torch.full((experts,), rows), torch.ones(experts, size) * rows)


@pytest.mark.parametrize("kind", ["iso", "rms", "energy", "abs", "power:0.25"])
def test_saliency_has_the_mean_of_the_diagonal(kind, generator):
    diagonal = spd(2, 16, generator).diagonal(dim1=-2, dim2=-1)
    salience = saliency(diagonal, torch.rand(2, 16, generator=generator), kind)
    torch.testing.assert_close(salience.mean(-1), diagonal.mean(-1), rtol=1e-5, atol=0)


def test_iso_is_flat_and_energy_is_the_diagonal(generator):
    diagonal = spd(1, 16, generator).diagonal(dim1=-2, dim2=-1)
    iso = saliency(diagonal, torch.ones(1, 16), "iso")
    energy = saliency(diagonal, torch.ones(1, 16), "energy")
    torch.testing.assert_close(iso, diagonal.mean().expand(1, 16), rtol=1e-5, atol=0)
    torch.testing.assert_close(energy, diagonal, rtol=1e-4, atol=0)


def test_an_input_never_seen_still_holds_its_weights(generator):
    diagonal = spd(1, 8, generator).diagonal(dim1=-2, dim2=-1).clone()
    diagonal[:, 3] = 0
    assert (saliency(diagonal, torch.ones(1, 8), "energy") > 0).all()


def test_an_expert_without_rows_is_held_evenly():
    hessian = Objective(gram_of(torch.zeros(1, 8, 8), rows=0), torch.tensor([3.0])).hessian(MethodConfig(damp=1e-4))
    assert torch.allclose(hessian, (3 + 1e-4) * torch.eye(8))


def test_the_metric_is_the_mean_the_pull_and_the_floor(generator):
    hessian, reg_lambda = spd(2, 10, generator), torch.tensor([0.5, 2.0])
    result = Objective(gram_of(hessian, rows=7), reg_lambda).hessian(MethodConfig(saliency="energy", damp=1e-2))
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    added = reg_lambda[:, None] * diagonal + 1e-2 * diagonal.mean(-1, keepdim=True)
    torch.testing.assert_close(result, hessian + torch.diag_embed(added), rtol=1e-3, atol=1e-6)


def test_lambda_is_free_of_scale(generator):
    hessian, reg_lambda = spd(1, 12, generator), torch.tensor([0.3])
    spec = MethodConfig(saliency="rms", damp=1e-3)
    small, large = (Objective(gram_of(scale * hessian), reg_lambda).hessian(spec) for scale in (1, 1024))
    torch.testing.assert_close(1024 * small, large, rtol=1e-5, atol=0)


def test_factor_is_upper_triangular_and_multiplies_back(generator):
    hessian = spd(3, 40, generator)
    result = factor(hessian, "site")
    assert torch.equal(result.matrix, result.matrix.triu())
    assert (result.matrix.diagonal(dim1=-2, dim2=-1) > 0).all()
    torch.testing.assert_close(result.matrix @ result.matrix.mT, hessian, rtol=1e-4, atol=1e-4)
    assert not result.damping.any()


def test_one_bad_matrix_climbs_the_ladder_and_leaves_the_others_alone(generator):
    hessian = spd(3, 20, generator)
    alone = factor(hessian[:1], "site").matrix[0]
    hessian[1] = 0
    hessian[1, 0, 0] = 1.0  # rank one: no factor without damping
    result = factor(hessian, "site")
    assert torch.equal(result.matrix[0], alone)
    assert result.damping[1] == 1e-3 and result.damping[0] == result.damping[2] == 0
    assert torch.isfinite(result.matrix).all()


def test_a_matrix_beyond_help_is_rounded_plainly():
    hessian = torch.eye(6).repeat(2, 1, 1)
    hessian[1, 0, 1] = hessian[1, 1, 0] = -50.0
    result = factor(hessian, "site")
    assert torch.isinf(result.damping[1]) and result.damping[0] == 0
    assert torch.equal(result.matrix[1], torch.eye(6))


def test_not_finite_names_the_site():
    hessian = torch.eye(4)[None].clone()
    hessian[0, 2, 2] = float("nan")
    with pytest.raises(NumericError, match=r"layers\.3\.mlp"):
        factor(hessian, "layers.3.mlp")

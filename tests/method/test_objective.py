import pytest
import torch
from torch import Tensor

from sarqc.errors import NumericError
from sarqc.method import objective


def spd(experts: int, size: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(experts, 3 * size, size, generator=generator) * torch.logspace(-1, 1, size)
    return x.mT @ x / x.shape[1]


@pytest.mark.parametrize("kind", ["iso", "rms", "energy", "abs", "power:0.25"])
def test_saliency_has_the_mean_of_the_diagonal(kind, generator):
    hessian = spd(2, 16, generator)
    salience = objective.saliency(hessian, torch.rand(2, 16, generator=generator), kind)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(salience.mean(-1), diagonal.mean(-1), rtol=1e-5, atol=0)


def test_iso_is_flat_and_energy_is_the_diagonal(generator):
    hessian = spd(1, 16, generator)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    iso = objective.saliency(hessian, torch.ones(1, 16), "iso")
    energy = objective.saliency(hessian, torch.ones(1, 16), "energy")
    torch.testing.assert_close(iso, diagonal.mean().expand(1, 16), rtol=1e-5, atol=0)
    torch.testing.assert_close(energy, diagonal, rtol=1e-4, atol=0)


def test_an_input_never_seen_still_holds_its_weights(generator):
    hessian = spd(1, 8, generator)
    hessian[:, 3, :] = hessian[:, :, 3] = 0
    assert (objective.saliency(hessian, torch.ones(1, 8), "energy") > 0).all()


def test_an_expert_without_rows_is_held_evenly():
    salience = objective.saliency(torch.zeros(1, 8, 8), torch.zeros(1, 8), "energy")
    assert torch.equal(salience, torch.ones(1, 8))
    metric = objective.regularised(torch.zeros(1, 8, 8), salience, torch.tensor([3.0]), 1e-4)
    assert torch.allclose(metric, (3 + 1e-4) * torch.eye(8))


def test_strength_is_free_of_scale(generator):
    hessian, ones = spd(1, 12, generator), torch.ones(1, 12)
    strength = torch.tensor([0.3])
    small = objective.regularised(hessian, objective.saliency(hessian, ones, "rms"), strength, 1e-3)
    large = objective.regularised(1024 * hessian, objective.saliency(1024 * hessian, ones, "rms"), strength, 1e-3)
    torch.testing.assert_close(1024 * small, large, rtol=1e-5, atol=0)


def test_factor_is_upper_triangular_and_multiplies_back(generator):
    hessian = spd(3, 40, generator)
    found = objective.factor(hessian, "site")
    assert torch.equal(found.matrix, found.matrix.triu())
    assert (found.matrix.diagonal(dim1=-2, dim2=-1) > 0).all()
    torch.testing.assert_close(found.matrix @ found.matrix.mT, hessian, rtol=1e-4, atol=1e-4)
    assert not found.damping.any()


def test_one_bad_matrix_climbs_the_ladder_and_leaves_the_others_alone(generator):
    hessian = spd(3, 20, generator)
    alone = objective.factor(hessian[:1], "site").matrix[0]
    hessian[1] = 0
    hessian[1, 0, 0] = 1.0  # rank one: no factor without damping
    found = objective.factor(hessian, "site")
    assert torch.equal(found.matrix[0], alone)
    assert found.damping[1] == 1e-3 and found.damping[0] == found.damping[2] == 0
    assert torch.isfinite(found.matrix).all()


def test_a_matrix_beyond_help_is_rounded_plainly():
    hessian = torch.eye(6).repeat(2, 1, 1)
    hessian[1, 0, 1] = hessian[1, 1, 0] = -50.0
    found = objective.factor(hessian, "site")
    assert torch.isinf(found.damping[1]) and found.damping[0] == 0
    assert torch.equal(found.matrix[1], torch.eye(6))


def test_not_finite_names_the_site():
    hessian = torch.eye(4)[None].clone()
    hessian[0, 2, 2] = float("nan")
    with pytest.raises(NumericError, match=r"layers\.3\.mlp"):
        objective.factor(hessian, "layers.3.mlp")

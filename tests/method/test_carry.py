"""Targets that make up for earlier errors: the algebra in fp64, the share's closed form, and that it helps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sarqc.method import objective
from sarqc.method.carry import held_out_share, shift, shifted
from sarqc.method.solve import solve_site
from sarqc.method.statistics import Gram, Statistics
from sarqc.spec import QuantSpec, SolveSpec, solve_spec

SPEC = SolveSpec(strength=0.3, carry_error=True)
STRENGTH = torch.tensor([0.3])


def drifted(rows: int, size: int, generator: torch.Generator, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """What the original feeds a site, and the quantized model: the same turned a little, and noise."""
    original = torch.randn(rows, size, generator=generator)
    turn = torch.eye(size) + 0.3 * torch.randn(size, size, generator=torch.Generator().manual_seed(7)) / size**0.5
    return original, original @ turn + noise * torch.randn(rows, size, generator=generator)


def seen(*folds: tuple[Tensor, Tensor]) -> Statistics:
    statistics = Statistics.zeros(1, folds[0][0].shape[1], len(folds), cross=True)
    for fold, (original, x) in enumerate(folds):
        statistics.add(x, fold=fold, original=original)
    return statistics


def test_the_cross_gram_is_what_the_two_models_have_in_common(generator):
    original, x = drifted(30, 8, generator)
    first, second, whole = (Gram.zeros(1, 8, cross=True) for _ in range(3))
    first.add(x[:11], original=original[:11])
    second.add(x[11:], original=original[11:])
    whole.add(x, original=original)
    first.merge(second)
    for gram in (first, whole, Statistics((whole,)).total()):
        drift = (original - x).double().T @ x.double() / 30
        torch.testing.assert_close(gram.drift()[0].double(), drift, rtol=1e-5, atol=1e-6)
    both = Statistics((Gram.zeros(1, 8, cross=True), whole))
    torch.testing.assert_close(both.total().drift(), whole.drift())
    assert both.folds[0].cross is not None and not both.folds[0].cross.any()


def test_completing_the_square(generator):
    """For any Q, F(Q) and tr[(Q - T) H (Q - T)^T] differ by the same constant, in fp64, at any share."""
    original, x = drifted(40, 12, generator)
    weight = torch.randn(1, 5, 12, generator=generator)
    gram = seen((original, x)).total()
    full = shift("s", weight, gram, STRENGTH, SPEC)[0].double()
    metric = objective.metric(gram, STRENGTH, SPEC)[0].double()
    anchor = metric - gram.hessian()[0].double()
    w, o, y = weight[0].double(), original.double(), x.double()
    for share in (0.3, 1.0):
        target, constants = w + share * full, []
        for seed in range(3):
            q = w + torch.randn(w.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            output = (y @ q.T - (y + share * (o - y)) @ w.T).pow(2).sum() / 40
            direct = output + ((q - w) @ anchor * (q - w)).sum()
            constants.append(float(direct - ((q - target) @ metric * (q - target)).sum()))
        assert constants == pytest.approx([constants[0]] * 3, rel=1e-4)


def test_the_share_is_the_least_of_a_parabola_on_the_other_fold(generator):
    folds = [drifted(60, 12, generator, noise=0.5) for _ in range(2)]
    statistics = seen(*folds)
    weight = torch.randn(1, 6, 12, generator=generator)
    share = held_out_share("s", weight, statistics, STRENGTH, SPEC)

    def loss(a: float) -> float:
        total = 0.0
        for (_, judging), fitted in zip(zip(statistics.folds, reversed(folds)), statistics.folds):
            original, x = judging
            target = (weight + a * shift("s", weight, fitted, STRENGTH, SPEC))[0].double()
            total += float((x.double() @ target.T - original.double() @ weight[0].double().T).pow(2).sum() / 60)
        return total

    assert 0 < share < 1
    assert loss(share) < min(loss(share - 0.02), loss(share + 0.02), loss(0.0))


def test_no_drift_no_shift(generator):
    x = torch.randn(40, 12, generator=generator)
    weight = torch.randn(1, 6, 12, generator=generator)
    target, share = shifted("s", weight, seen((x[:20], x[:20]), (x[20:], x[20:])), STRENGTH, SPEC)
    assert share == 0.0 or (target - weight).abs().max() < 1e-4
    assert shifted("s", weight, seen((x, x)), STRENGTH, SPEC) == (weight, 0.0)  # one fold: nothing to judge on


def test_unrelated_errors_are_left_alone(generator):
    """Folds that drift in opposite directions: what one teaches is wrong on the other."""
    x = torch.randn(80, 12, generator=generator)
    folds = [(x[:40] * 1.5, x[:40]), (x[40:] * 0.5, x[40:])]
    weight = torch.randn(1, 6, 12, generator=generator)
    target, share = shifted("s", weight, seen(*folds), STRENGTH, SPEC)
    assert share == 0.0 and target is weight


def test_the_output_comes_nearer_to_the_original_models_on_new_text(generator):
    folds = [drifted(200, 32, generator) for _ in range(3)]
    weight = torch.randn(1, 24, 32, generator=generator)
    wanted = folds[2][0] @ weight[0].T
    errors = {}
    for carry in (False, True):
        spec = solve_spec(strength=0.1, carry_error=carry)
        quantized, report = solve_site(
            "s", weight, seen(*folds[:2]), QuantSpec(bits=4, group_size=32), spec, scale_dtype=torch.bfloat16
        )
        errors[carry] = float((folds[2][1] @ quantized.dequantize()[0].T - wanted).pow(2).sum())
        assert (report.carried > 0.5) is carry
    assert errors[True] < 0.6 * errors[False]

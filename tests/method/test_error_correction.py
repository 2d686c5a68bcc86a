"""Targets that correct the error of earlier layers: the algebra in fp64, the share's closed form, and that it helps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sarqc.config import MethodConfig, QuantConfig
from sarqc.method.error_correction import (
    CAUTION,
    corrected_target,
    correction,
    correction_share,
    fold_fits,
    limited_target,
    weight_change,
)
from sarqc.method.gram import Gram, Statistics
from sarqc.method.hessian import Objective
from sarqc.method.layer import solve_site

SPEC = MethodConfig(reg_lambda=0.3, error_correction=True)
LAMBDA = torch.tensor([0.3])


def drifted(
    rows: int, size: int, outputs: int, generator: torch.Generator, noise: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Inputs of a site, and what its outputs should gain: some of it follows from the inputs, the rest is noise."""
    x = torch.randn(rows, size, generator=generator)
    follows = torch.randn(size, outputs, generator=torch.Generator().manual_seed(7)) / size**0.5
    return x, 0.5 * x @ follows + noise * torch.randn(rows, outputs, generator=generator)


def seen(*folds: tuple[Tensor, Tensor]) -> Statistics:
    x, residual = folds[0]
    statistics = Statistics.zeros(1, x.shape[1], len(folds), cross_rows=residual.shape[1])
    for fold, (x, residual) in enumerate(folds):
        statistics.add(x, fold=fold, residual=residual)
    return statistics


def test_wishes_add_up_like_everything_else(generator):
    x, residual = drifted(30, 8, 5, generator)
    first, second, whole = (Gram.zeros(1, 8, cross_rows=5) for _ in range(3))
    first.add(x[:11], residual=residual[:11])
    second.add(x[11:], residual=residual[11:])
    whole.add(x, residual=residual)
    expected = residual.double().T @ x.double() / 30
    for total in (Statistics((first, second)).total(), whole, Statistics((whole,)).total()):
        torch.testing.assert_close(total.cross_mean()[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_completing_the_square(generator):
    """For any Q, F(Q) and tr[(Q - T) H (Q - T)^T] differ by the same constant, in fp64, at any share."""
    x, cross_gram = drifted(40, 12, 5, generator)
    weight = torch.randn(1, 5, 12, generator=generator)
    gram = seen((x, cross_gram)).total()
    full = correction("s", Objective(gram, LAMBDA), SPEC)[0].double()
    hessian = Objective(gram, LAMBDA).hessian(SPEC)[0].double()
    anchor = hessian - gram.second_moment()[0].double()
    w, r, y = weight[0].double(), cross_gram.double(), x.double()
    for share in (0.3, 1.0):
        target, constants = w + share * full, []
        for seed in range(3):
            q = w + torch.randn(w.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            output = (y @ q.T - y @ w.T - share * r).pow(2).sum() / 40
            direct = output + ((q - w) @ anchor * (q - w)).sum()
            constants.append(float(direct - ((q - target) @ hessian * (q - target)).sum()))
        assert constants == pytest.approx(
            [constants[0]] * 3, rel=1e-3
        )  # H is fp32, and the constants are what is left of terms a hundred times as large


def test_the_share_is_the_least_of_a_parabola_on_the_other_fold(generator):
    folds = [drifted(60, 12, 6, generator, noise=1.0) for _ in range(2)]
    statistics = seen(*folds)
    apart = [fold_fits("s", statistics, LAMBDA, SPEC, [fold]) for fold in range(2)]  # as two ranks do it
    share = correction_share(torch.cat(apart)) / CAUTION
    assert correction_share(fold_fits("s", statistics, LAMBDA, SPEC, range(2))) == CAUTION * share

    def loss(a: float) -> float:
        total = 0.0
        for (x, cross_gram), fitted in zip(reversed(folds), statistics.folds):
            gained = a * correction("s", Objective(fitted, LAMBDA), SPEC)[0].double()
            total += float((x.double() @ gained.T - cross_gram.double()).pow(2).sum() / 60)
        return total

    assert 0 < share < 1
    assert loss(share) < min(loss(share - 0.02), loss(share + 0.02), loss(0.0))


def test_no_drift_no_shift(generator):
    x, weight = torch.randn(40, 12, generator=generator), torch.randn(1, 6, 12, generator=generator)
    none = torch.zeros(20, 6)
    assert corrected_target("s", weight, seen((x[:20], none), (x[20:], none)), LAMBDA, SPEC) == (weight, 0.0)
    assert corrected_target("s", weight, seen((x, x[:, :6])), LAMBDA, SPEC) == (
        weight,
        0.0,
    )  # one fold: no one to judge
    plain = Statistics.zeros(1, 12, 2)
    plain.add(x[:20])
    plain.add(x[20:], fold=1)
    assert corrected_target("s", weight, plain, LAMBDA, SPEC) == (weight, 0.0)  # not the last of its block


def test_rows_of_the_weight_are_corrected_one_by_one(generator):
    """So that ranks can share them: their changes, and the limit that all of them have together."""
    weight = torch.randn(1, 6, 12, generator=generator)
    statistics = seen(*(drifted(60, 12, 6, generator) for _ in range(2)))
    for size in (1.0, 1e-3):
        small = size * weight
        target, share = corrected_target("s", small, statistics, LAMBDA, SPEC)
        best = correction_share(fold_fits("s", statistics, LAMBDA, SPEC, range(2)))
        assert not torch.equal(target, small) and (share < best) is (size < 1)
        parts = []
        for rows in (slice(0, 2), slice(2, 6)):
            own = statistics.of_outputs(rows)
            parts.append(
                (small[:, rows], *weight_change("s", small[:, rows], Objective(own.total(), LAMBDA), SPEC, best))
            )
        sums = torch.stack([sums for _, _, sums in parts]).sum(0)
        together = torch.cat([limited_target(weight, change, sums, best)[0] for weight, change, _ in parts], 1)
        torch.testing.assert_close(together, target)


def test_unrelated_errors_are_left_alone(generator):
    """Folds that drift in opposite directions: what one teaches is wrong on the other."""
    x, cross_gram = drifted(80, 12, 6, generator)
    weight = torch.randn(1, 6, 12, generator=generator)
    target, share = corrected_target(
        "s", weight, seen((x[:40], cross_gram[:40]), (x[40:], -cross_gram[40:])), LAMBDA, SPEC
    )
    assert share == 0.0 and target is weight


def test_the_output_comes_nearer_to_what_it_should_be_on_new_text(generator):
    folds = [drifted(200, 32, 24, generator) for _ in range(3)]
    weight = torch.randn(1, 24, 32, generator=generator)
    x, cross_gram = folds[2]
    errors = {}
    for carry in (False, True):
        statistics = seen(*folds[:2]) if carry else seen(*((rows, rows.new_zeros(200, 24)) for rows, _ in folds[:2]))
        spec = MethodConfig(reg_lambda=0.1, error_correction=carry)
        quantized, report = solve_site(
            "s", weight, statistics, QuantConfig(bits=4, group_size=32), spec, scale_dtype=torch.bfloat16
        )
        errors[carry] = float((x @ quantized.dequantize()[0].T - x @ weight[0].T - cross_gram).pow(2).sum())
        assert (report.correction_share > 0.4) is carry
    assert errors[True] < errors[False] - 0.4 * float(
        cross_gram.pow(2).sum()
    )  # half a share leaves a quarter of a wish


def test_a_correction_is_at_most_as_large_as_the_weight_and_zero_rows_stay_zero(generator):
    x, cross_gram = drifted(60, 12, 5, generator)
    statistics = seen((x[:30], cross_gram[:30]), (x[30:], cross_gram[30:]))
    weight = torch.randn(1, 5, 12, generator=generator)
    target, share = corrected_target("s", weight, statistics, LAMBDA, SPEC)
    assert 0 < (target - weight).norm() < weight.norm()
    small = 1e-4 * weight
    bounded, less = corrected_target("s", small, statistics, LAMBDA, SPEC)
    assert (bounded - small).norm() == pytest.approx(float(small.norm()), rel=1e-4)
    assert less == pytest.approx(share * float(small.norm() / (target - weight).norm()), rel=1e-3)
    weight[0, 2] = 0
    target, _ = corrected_target("s", weight, statistics, LAMBDA, SPEC)
    assert not target[0, 2].any() and target[0, 3].ne(weight[0, 3]).any()
    assert corrected_target("s", torch.zeros_like(weight), statistics, LAMBDA, SPEC)[1] == 0

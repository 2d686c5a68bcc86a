"""Judging on other text: the numbers by hand in fp64, and that trials side by side are trials one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from sarqc.config import MethodConfig, QuantConfig
from sarqc.method.gptq import solve_gptq
from sarqc.method.gram import Statistics
from sarqc.method.hessian import Objective
from sarqc.method.lambda_search import EXPERTS, ROWS, HeldOutValidation, LambdaSearch
from sarqc.method.layer import SOLVERS, choose_lambda, solve_site

QUANT = QuantConfig(bits=3, group_size=16)
BF16 = torch.bfloat16


def two_folds(first: Tensor, second: Tensor, offsets: tuple[Tensor, Tensor] | None = None) -> Statistics:
    experts = 1 if offsets is None else len(offsets[0]) - 1
    statistics = Statistics.zeros(experts, first.shape[1], folds=2)
    for fold, x in enumerate((first, second)):
        statistics.add(x, None if offsets is None else offsets[fold], fold=fold)
    return statistics


def shaky(rows: int, size: int, generator: torch.Generator) -> Tensor:
    mix = torch.randn(size, size, generator=generator) / size**0.5 + torch.eye(size)
    return torch.randn(rows, size, generator=generator) @ mix


def by_rounding_down(rows: Tensor, *_: object) -> Tensor:
    return rows.floor()


def test_losses_are_those_of_the_text_that_was_not_fitted(generator):
    first, second = shaky(30, 16, generator), shaky(20, 16, generator)
    weight = torch.randn(1, 8, 16, generator=generator)
    scale = []

    def quantize_rows(rows: Tensor, gram, reg_lambda: Tensor) -> Tensor:
        scale.append(gram.rows.tolist())
        return rows * (1 - reg_lambda[:, None, None] / 100)

    validation = HeldOutValidation(
        weight, two_folds(first, second), 0.0, 0, quantize_rows, lambda rows: torch.zeros_like(rows)
    )
    for fit_fold, unseen in enumerate((second, first, second)):
        output = float((unseen.double() @ weight[0].double().T).pow(2).sum())
        assert abs(validation.rtn_loss(fit_fold) / output - 1) < 1e-5
        for reg_lambda, loss in zip((1.0, 10.0), validation.losses([1.0, 10.0], fit_fold)):
            assert abs(loss / (output * (reg_lambda / 100) ** 2) - 1) < 1e-5
    assert scale == [[30, 30], [20, 20], [30, 30]]


def test_of_three_folds_two_judge(generator):
    x = [shaky(rows, 16, generator) for rows in (10, 20, 30)]
    statistics = Statistics.zeros(1, 16, folds=3)
    for fold, rows in enumerate(x):
        statistics.add(rows, fold=fold)
    weight = torch.randn(1, 8, 16, generator=generator)
    validation = HeldOutValidation(weight, statistics, 0.0, 0, by_rounding_down, lambda rows: torch.zeros_like(rows))
    output = float((torch.cat([x[0], x[2]]).double() @ weight[0].double().T).pow(2).sum())
    assert abs(validation.rtn_loss(1) / output - 1) < 1e-5


def test_trials_side_by_side_are_trials_one_by_one(generator, monkeypatch):
    x = [shaky(60, 32, generator) for _ in range(2)]
    offsets = (torch.tensor([0, 20, 20, 60]), torch.tensor([0, 10, 30, 60]))
    weight = torch.randn(3, 24, 32, generator=generator)

    def quantize_rows(rows: Tensor, gram, reg_lambda: Tensor) -> Tensor:
        return solve_gptq(
            "s", rows, Objective(gram, reg_lambda), QUANT, MethodConfig("sarqc-gptq"), BF16
        ).weight.dequantize()

    for shrinkage in (0.0, 0.5):
        validation = HeldOutValidation(weight, two_folds(*x, offsets), shrinkage, 0, quantize_rows, by_rounding_down)
        together = validation.losses([0.1, 1.0, 10.0], 0)
        assert together == [validation.losses([s], 0)[0] for s in (0.1, 1.0, 10.0)]
        monkeypatch.setattr("sarqc.method.lambda_search.TRIAL_BYTES", 1)
        assert together == validation.losses([0.1, 1.0, 10.0], 0)
        monkeypatch.undo()


def test_only_some_rows_and_experts_are_tried(generator):
    weight = torch.randn(3 * EXPERTS, 4 * ROWS, 8, generator=generator)
    x = torch.randn(60, 8, generator=generator)
    offsets = torch.linspace(0, 60, 3 * EXPERTS + 1).long()
    validation = HeldOutValidation(
        weight, two_folds(x, x, (offsets, offsets)), 0.0, 0, by_rounding_down, by_rounding_down
    )
    assert validation.weight.shape == (EXPERTS, ROWS, 8)
    again = HeldOutValidation(weight, two_folds(x, x, (offsets, offsets)), 0.0, 0, by_rounding_down, by_rounding_down)
    assert torch.equal(validation.weight, again.weight)
    other = HeldOutValidation(weight, two_folds(x, x, (offsets, offsets)), 0.0, 1, by_rounding_down, by_rounding_down)
    assert not torch.equal(validation.weight, other.weight)


def test_auto_does_better_on_new_text_than_no_regulariser(generator):
    """Fewer rows than inputs: the choice must be a strong pull, and must beat plain GPTQ on rows from elsewhere."""
    mix = torch.randn(64, 64, generator=generator) / 8 + torch.eye(64)
    text = torch.randn(548, 64, generator=generator) @ mix
    weight = torch.randn(1, 48, 64, generator=generator)
    statistics = two_folds(text[:24], text[24:48])
    new = {}
    for method in ("rtn", "gptq", "sarqc-gptq"):
        spec = MethodConfig(method)
        quantized, report = solve_site(
            "s", weight, statistics if spec.calibrated else None, QUANT, spec, scale_dtype=BF16
        )
        new[method] = float(((weight - quantized.dequantize())[0] @ text[48:].T).pow(2).sum())
    assert new["sarqc-gptq"] < 0.9 * min(new["rtn"], new["gptq"])
    assert report.reg_lambda >= 0.3 and report.held_out["curve"]


def test_hopeless_statistics_end_in_plain_rounding_and_say_so(generator, monkeypatch):
    """Folds that contradict each other: what is learnt on one is wrong on the other, at every lambda tried."""
    weight = torch.randn(1, 32, 16, generator=generator)
    statistics = two_folds(torch.ones(8, 16), torch.ones(8, 16))

    def harmful(site, weight, *rest):
        return solve_gptq(site, -weight, *rest)

    monkeypatch.setitem(SOLVERS, "gptq", harmful)

    quantized, report = solve_site("s", weight, statistics, QUANT, MethodConfig("sarqc-gptq"), scale_dtype=BF16)
    plain, _ = solve_site("s", weight, None, QUANT, MethodConfig("rtn"), scale_dtype=BF16)
    assert torch.equal(quantized.codes, plain.codes) and torch.equal(quantized.scales, plain.scales)
    assert "RTN" in report.fallback and report.reg_lambda == 0.0


def test_choosing_is_deterministic_and_leaves_the_statistics_alone(generator):
    statistics = two_folds(shaky(40, 32, generator), shaky(40, 32, generator))
    before = [fold.sum.clone() for fold in statistics.folds]
    weight = torch.randn(1, 16, 32, generator=generator)
    first, second = (
        choose_lambda(
            "s", "k", lambda: weight, statistics, QUANT, MethodConfig(), scale_dtype=BF16, search=LambdaSearch()
        ).record()
        for _ in range(2)
    )
    assert first == second
    assert all(torch.equal(fold.sum, kept) for fold, kept in zip(statistics.folds, before))

"""The search for channel scales, against the same sums written out in float64."""

from __future__ import annotations

import pytest
import torch

from sarqc.config import MethodConfig, QuantConfig
from sarqc.method.awq import EXPONENTS, SMALL_EXPONENTS, BalanceLayer, Scaling, search
from sarqc.method.gptq import loss_weight
from sarqc.method.gram import Gram, Statistics
from sarqc.method.hessian import Objective, saliency
from sarqc.method.lambda_search import LambdaSearch
from sarqc.method.layer import solve_site
from sarqc.method.rtn import quantize_rtn
from sarqc.method.weight import QuantizedWeight
from sarqc_kernels.columns import fit_grid, round_to_grid

# Asymmetric: the widest weight of a symmetric group stands exactly between two codes, where float32 and float64 differ.
QUANT = QuantConfig(bits=3, group_size=16, sym=False)
INPUTS = 32


def activations(rows, generator):
    """Rows with a few inputs that are much larger than the others, as language models have them."""
    mix = torch.eye(INPUTS) + 0.2 * torch.randn(INPUTS, INPUTS, generator=generator)
    sizes = torch.exp(torch.randn(INPUTS, generator=generator))
    return torch.randn(rows, INPUTS, generator=generator) @ mix * sizes


def seen(*parts):
    gram = Gram.zeros(len(parts), INPUTS)
    offsets = torch.tensor([0, *torch.tensor([len(part) for part in parts]).cumsum(0).tolist()])
    gram.add(torch.cat(parts), offsets)
    return gram


def reg_lambda(gram, spec):
    return LambdaSearch().choose("", gram.rows, INPUTS, spec, None).reg_lambda


def balance_layer(weight, gram, method="sarqc-awq"):
    cost = loss_weight("site", Objective(gram, reg_lambda(gram, MethodConfig(method))), QUANT, MethodConfig(method))
    return BalanceLayer(weight, cost, gram, QUANT)


def find(balance_layers, *, shared=False, **options):
    return search(balance_layers, torch.float32, shared=shared, binary=False, **options)


def scales_for(magnitude, exponent):
    power = magnitude.double() ** exponent
    return power / (power.max() * power.min()).sqrt()


def loss_of(weight, scales, hessian):
    """tr(E M E^T) for one matrix, E = W - Q(W S) S^-1, in float64 after the rounding itself."""
    rounded = quantize_rtn((weight * scales)[None].float(), QUANT, "minmax", torch.float32).dequantize()[0].double()
    error = weight.double() - rounded / scales
    return float((error @ hessian.double() @ error.T).trace())


@pytest.mark.parametrize("method", ["awq", "rqc-awq", "sarqc-awq"])
def test_the_choice_is_the_least_loss_of_all_exponents(method, generator):
    gram = seen(activations(200, generator))
    weight = torch.randn(1, 24, INPUTS, generator=generator)
    hessian = Objective(gram, reg_lambda(gram, MethodConfig(method))).hessian(MethodConfig(method))[0]
    magnitude = gram.abs_mean()[0]
    losses = [loss_of(weight[0], scales_for(magnitude, exponent), hessian) for exponent in EXPONENTS]
    chosen = find([balance_layer(weight, gram, method)])
    exponent = float(chosen.exponents[0])
    assert losses[EXPONENTS.index(exponent)] == pytest.approx(min(losses), rel=1e-5)
    assert min(losses) < 0.9 * losses[0]  # the case is one where scales help
    torch.testing.assert_close(chosen.scales[0].double(), scales_for(magnitude, exponent), rtol=1e-4, atol=0)


def test_the_gram_solver_is_served_on_the_grids_it_will_use(generator):
    gram = seen(activations(200, generator))
    weight = torch.randn(1, 24, INPUTS, generator=generator)
    only = balance_layer(weight, gram, "sarqc-awq-gptq")
    price = only.cost[0].double()
    losses = []
    for exponent in SMALL_EXPONENTS:
        scales = scales_for(gram.abs_mean()[0], exponent)
        scaled = (weight[0] * scales).float()[None]
        grid = {"bits": QUANT.bits, "group_size": QUANT.group_size, "sym": QUANT.sym, "search": True}
        result = fit_grid(scaled, (price / scales**2).float()[None], scale_dtype=torch.float32, **grid)
        rounded = QuantizedWeight(round_to_grid(scaled, *result, bits=QUANT.bits), *result, QUANT.bits).dequantize()
        error = weight[0].double() - rounded[0].double() / scales
        losses.append(float((error.square() * price).sum()))
    chosen = float(find([only]).exponents[0])
    assert losses[SMALL_EXPONENTS.index(chosen)] == pytest.approx(min(losses), rel=1e-4)


def test_for_the_gram_solver_an_error_costs_what_the_later_columns_cannot_correct(generator):
    """M_jj^2 is the conditional energy of input j given those that come after it in the solver's order."""
    gram = seen(activations(400, generator))
    spec = MethodConfig("sarqc-awq-gptq", act_order="none")
    cost = loss_weight("site", Objective(gram, reg_lambda(gram, spec)), QUANT, spec)[0].double()
    hessian = Objective(gram, reg_lambda(gram, spec)).hessian(spec)[0].double()
    for column in range(INPUTS):
        later = hessian[column + 1 :, column + 1 :]
        cross = hessian[column, column + 1 :]
        expected = hessian[column, column] - cross @ torch.linalg.solve(later, cross)
        assert cost[column] == pytest.approx(float(expected), rel=1e-3)


def test_the_cost_stands_at_its_own_input_whatever_the_order(generator):
    gram = seen(activations(400, generator))
    gram.sum = torch.diag_embed(gram.sum.diagonal(dim1=1, dim2=2))  # independent inputs: order does not matter
    plain, grouped = (
        loss_weight("site", Objective(gram, torch.ones(1)), QUANT, MethodConfig("sarqc-awq-gptq", act_order=order))
        for order in ("none", "group")
    )
    torch.testing.assert_close(plain, grouped)


def test_experts_of_one_call_choose_as_if_alone(generator):
    parts = [activations(rows, generator) for rows in (150, 90, 300)]
    weight = torch.randn(3, 24, INPUTS, generator=generator)
    together = find([balance_layer(weight, seen(*parts))])
    for expert, part in enumerate(parts):
        alone = find([balance_layer(weight[expert : expert + 1], seen(part))])
        assert together.exponents[expert] == alone.exponents[0]
        torch.testing.assert_close(together.scales[expert], alone.scales[0])


def test_portions_of_experts_change_nothing(generator, monkeypatch):
    weight = torch.randn(3, 24, INPUTS, generator=generator)
    only = balance_layer(weight, seen(*(activations(100, generator) for _ in range(3))))
    whole = find([only])
    monkeypatch.setattr("sarqc.method.awq.ELEMENTS", 1)
    assert torch.equal(find([only]).scales, whole.scales)


def test_shared_scales_weigh_each_expert_by_its_rows(generator):
    x = activations(300, generator)
    weight = torch.randn(2, 24, INPUTS, generator=generator)
    halves = balance_layer(weight, seen(x[:200], x[200:]))
    other = balance_layer(torch.randn(1, 8, INPUTS, generator=generator), seen(x))
    chosen = find([halves, other], shared=True)
    magnitude = x.abs().mean(0)
    metrics = [*halves.cost, other.cost[0]]
    matrices = [*weight, other.weight[0]]
    losses = []
    for exponent in EXPONENTS:
        scales = scales_for(magnitude, exponent)
        each = [loss_of(matrix, scales, hessian) for matrix, hessian in zip(matrices, metrics)]
        losses.append(sum(loss * rows for loss, rows in zip(each, (200, 100, 300))))
    assert chosen.scales.shape == (1, INPUTS)
    assert losses[EXPONENTS.index(float(chosen.exponents[0]))] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("method", ["awq", "sarqc-awq", "sarqc-awq-gptq"])
def test_an_expert_without_rows_is_left_alone_and_disturbs_nobody(method, generator):
    x = activations(120, generator)
    weight = torch.randn(2, 24, INPUTS, generator=generator)
    both = find([balance_layer(weight, seen(x, x[:0]), method)])
    assert torch.equal(both.scales[1], torch.ones(INPUTS)) and both.exponents[1] == 0
    alone = find([balance_layer(weight[:1], seen(x), method)])
    torch.testing.assert_close(both.scales[0], alone.scales[0])
    none = find([balance_layer(weight, seen(x[:0], x[:0]), method)], shared=True)
    assert torch.equal(none.scales, torch.ones(1, INPUTS))


def test_an_input_that_was_never_excited_keeps_weights_that_count(generator):
    x = activations(200, generator)
    x[:, 3] = 0
    chosen = find([balance_layer(torch.randn(1, 24, INPUTS, generator=generator), seen(x))])
    assert chosen.exponents[0] > 0 and chosen.scales.isfinite().all()
    relative = chosen.scales[0, 3] / chosen.scales[0].amax()
    assert relative > 1e-3


def test_powers_of_two_where_they_are_asked_for(generator):
    only = balance_layer(torch.randn(1, 24, INPUTS, generator=generator), seen(activations(200, generator)))
    chosen = search([only], torch.float32, shared=True, binary=True)
    assert chosen.exponents[0] > 0 and chosen.scales.unique().numel() > 2
    assert torch.equal(chosen.scales, chosen.scales.log2().round().exp2())


def test_inputs_of_one_channel_share_its_scale(generator):
    gram = seen(activations(200, generator))
    only = balance_layer(torch.randn(1, 24, INPUTS, generator=generator), gram)
    source = torch.arange(INPUTS) % 8
    chosen = find([only], source=source, channels=9)  # the last has no input
    magnitude = gram.abs_mean().view(4, 8).mean(0)
    expected = scales_for(magnitude, float(chosen.exponents[0]))
    ratio = chosen.scales[0, :8].double() / expected
    assert chosen.scales.shape == (1, 9) and chosen.exponents[0] > 0
    torch.testing.assert_close(ratio, ratio[:1].expand(8), rtol=1e-4, atol=0)


def test_the_regulariser_stays_where_the_original_weights_are(generator):
    """H + lambda D scaled as a whole: for even saliency that is d_j / s_j^2, not a fresh D of the scaled inputs."""
    gram = seen(activations(100, generator))
    scales = torch.rand(1, INPUTS, generator=generator) + 0.5
    scaling = Scaling(scales, torch.ones(1, 4))
    chosen = reg_lambda(gram, MethodConfig("rqc-awq"))
    hessian = Objective(gram, chosen).hessian(MethodConfig("rqc-awq"))
    moment = gram.second_moment()
    even = saliency(gram.diagonal(), gram.abs_mean(), "iso")
    inverse = torch.diag_embed(1 / scales)
    by_hand = inverse @ moment @ inverse + torch.diag_embed(chosen[:, None] * even / scales**2)
    floor = inverse @ (MethodConfig("rqc-awq").damp * gram.diagonal().mean() * torch.eye(INPUTS)) @ inverse
    torch.testing.assert_close(scaling.hessian(hessian), by_hand + floor)


@pytest.mark.parametrize("method", ["awq", "sarqc-awq", "sarqc-awq-gptq"])
def test_solving_scaled_is_solving_the_scaled_problem(method, generator):
    """Powers of two are exact, energy moves with the scales, rows do not mix: the same codes, whatever is scaled."""
    x = activations(300, generator)
    weight = torch.randn(1, 24, INPUTS, generator=generator)
    inputs = torch.exp2(torch.randint(-2, 3, (1, INPUTS), generator=generator).float())
    rows = torch.exp2(torch.randint(-2, 3, (1, 24), generator=generator).float())
    scaling = Scaling(inputs, rows, 0.5, "because")
    spec = MethodConfig(method, damp=0.0)
    before, after = Statistics.zeros(1, INPUTS), Statistics.zeros(1, INPUTS)
    before.add(x)
    after.add(x / inputs)
    result, report = solve_site("site", weight, before, QUANT, spec, scale_dtype=torch.bfloat16, scaling=scaling)
    direct, _ = solve_site("site", scaling.apply(weight), after, QUANT, spec, scale_dtype=torch.bfloat16)
    assert (result.codes != direct.codes).float().mean() < 0.01
    error = ((weight - scaling.undo(result.dequantize()))[0].double() @ x.double().T).square().sum()
    signal = (weight[0].double() @ x.double().T).square().sum()
    assert report.error == pytest.approx(float(error / signal), rel=1e-3)
    assert (report.exponent, report.unscaled) == (0.5, "because")


def test_what_is_scaled_comes_back(generator):
    scaling = Scaling(torch.rand(2, INPUTS, generator=generator) + 0.5, torch.rand(2, 6, generator=generator) + 0.5)
    weight = torch.randn(2, 6, INPUTS, generator=generator)
    torch.testing.assert_close(scaling.undo(scaling.apply(weight)), weight)
    picked = torch.tensor([4, 1])
    torch.testing.assert_close(scaling.rows_at(picked).apply(weight[:, picked]), scaling.apply(weight)[:, picked])


def test_same_input_same_scales(generator):
    only = balance_layer(torch.randn(1, 24, INPUTS, generator=generator), seen(activations(100, generator)))
    assert torch.equal(find([only]).scales, find([only]).scales)

import pytest
import torch
from torch import Tensor

from sarqc.config import METHODS, MethodConfig, QuantConfig
from sarqc.errors import ArgumentError, NumericError
from sarqc.method.gram import Statistics
from sarqc.method.layer import solve_site

QUANT = QuantConfig(bits=3, group_size=16)


def correlated(rows: int, size: int, generator: torch.Generator) -> Tensor:
    mix = torch.randn(size, size, generator=generator) / size**0.5 + torch.eye(size)
    return torch.randn(rows, size, generator=generator) @ mix * torch.logspace(-0.5, 0.5, size)


def seen(x: Tensor, offsets: Tensor | None = None) -> Statistics:
    statistics = Statistics.zeros(1 if offsets is None else len(offsets) - 1, x.shape[1])
    statistics.add(x, offsets)
    return statistics


def solve(weight: Tensor, statistics: Statistics | None, spec: MethodConfig, quant: QuantConfig = QUANT):
    return solve_site("site", weight, statistics, quant, spec, scale_dtype=torch.bfloat16)


def output_error(weight: Tensor, quantized: Tensor, x: Tensor) -> float:
    return float(((weight - quantized).double() @ x.double().T).pow(2).sum())


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.calibrated])
@pytest.mark.parametrize(
    "quant", [QUANT, QuantConfig(bits=4, group_size=-1), QuantConfig(bits=2, group_size=32, sym=False)]
)
def test_every_gram_method_beats_rounding_on_what_it_saw_and_says_so_truly(method, quant, generator):
    x = correlated(512, 64, generator)
    weight = torch.randn(1, 48, 64, generator=generator)
    quantized, report = solve(weight, seen(x), MethodConfig(method), quant)
    signal = output_error(weight[0], torch.zeros(48, 64), x)
    measured = output_error(weight[0], quantized.dequantize()[0], x) / signal
    assert report.error == pytest.approx(measured, rel=1e-3)
    assert report.error < 0.9 * report.rtn_error
    assert report.rows == (512,) and report.fallback is None


def test_independent_inputs_leave_nothing_to_correct():
    """H = I on a min-max grid is RTN, code for code."""
    weight = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(1))
    spec = MethodConfig("gptq", act_order="none")
    by_gram, _ = solve(weight, seen(torch.eye(32)), spec)
    by_rounding, _ = solve(weight, None, MethodConfig("rtn"))
    assert torch.equal(by_gram.codes, by_rounding.codes)
    assert torch.equal(by_gram.scales, by_rounding.scales)


def test_a_pull_without_end_is_plain_rounding(generator):
    x = correlated(256, 32, generator)
    weight = torch.randn(1, 20, 32, generator=generator)
    spec = MethodConfig("gptq", reg_lambda=1e8, act_order="none")
    assert torch.equal(solve(weight, seen(x), spec)[0].codes, solve(weight, None, MethodConfig("rtn"))[0].codes)


@pytest.mark.parametrize("method", list(METHODS))
def test_linears_that_share_inputs_may_share_a_call(method, generator):
    x = correlated(128, 32, generator)
    first, second = torch.randn(1, 24, 32, generator=generator), torch.randn(1, 8, 32, generator=generator)
    together, _ = solve(torch.cat([first, second], 1), seen(x), MethodConfig(method))
    parts = together.split([24, 8])
    for part, weight in zip(parts, (first, second)):
        alone, _ = solve(weight, seen(x), MethodConfig(method))
        assert torch.equal(part.codes, alone.codes) and torch.equal(part.scales, alone.scales)


def test_an_expert_with_no_rows_is_sound_and_disturbs_nobody(generator):
    x = correlated(200, 32, generator)
    weight = torch.randn(3, 16, 32, generator=generator)
    spec = MethodConfig("sarqc-gptq", expert_shrinkage=0.0)
    quantized, report = solve(weight, seen(x, torch.tensor([0, 120, 120, 200])), spec)
    alone, _ = solve(weight[:1], seen(x[:120]), spec)
    assert torch.equal(quantized.expert(0).codes, alone.codes)
    assert report.rows == (120, 0, 80)
    starved = quantized.expert(1).dequantize()[0]
    assert (starved - weight[1]).abs().max() < quantized.scales[1].float().max()


def test_scales_are_what_is_stored(generator):
    weight = torch.randn(1, 8, 32, generator=generator)
    quantized, _ = solve(weight, None, MethodConfig("rtn"))
    assert quantized.scales.dtype == torch.bfloat16
    error = (quantized.dequantize() - weight).abs().unflatten(-1, (2, 16)).amax(-1)
    # Half a step, and the top code of a symmetric grid may clip by half a step more.
    assert (error <= 1.001 * quantized.scales.float()).all()


def test_same_input_same_bytes(generator):
    x, weight = correlated(100, 32, generator), torch.randn(1, 8, 32, generator=generator)
    first, second = (solve(weight, seen(x), MethodConfig("sarqc-gptq"))[0] for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scales, second.scales)


def test_a_weight_with_nan_is_refused_by_name():
    weight = torch.full((1, 4, 16), float("nan"))
    with pytest.raises(NumericError, match="site"):
        solve(weight, None, MethodConfig("rtn"))


def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(ArgumentError, match="16 does not divide 40"):
        solve(torch.zeros(1, 4, 40), None, MethodConfig("rtn"))


def test_one_expert_of_a_layer_is_said_to_have_the_rows_that_it_was_shrunk_by(generator):
    """A chunk of one expert has the rest of its layer beside it; a dense layer has none."""
    spec, x = MethodConfig("gptq", expert_shrinkage=0.25), correlated(64, 32, generator)
    chunk = Statistics.zeros(1, 32, rest=True)
    chunk.add(x)
    chunk.add_rest(x)
    weight = torch.randn(1, 16, 32, generator=generator)
    assert solve(weight, chunk, spec)[1].prior_rows == 8 and solve(weight, seen(x), spec)[1].prior_rows == 0

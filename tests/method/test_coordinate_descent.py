import pytest
import torch
from torch import Tensor

from sarqc.config import MethodConfig, QuantConfig
from sarqc.errors import ArgumentError
from sarqc.method.gram import Statistics
from sarqc.method.hessian import factor
from sarqc.method.layer import solve_site
from sarqc.method.weight import QuantizedWeight
from sarqc_kernels.columns import coordinate_descent, quantize_columns
from sarqc_kernels.columns.descent_reference import REACH


def metric_of(experts: int, size: int, generator: torch.Generator) -> Tensor:
    """Symmetric, positive, with inputs that are strongly correlated and of different size."""
    mix = torch.randn(experts, 2 * size, size, generator=generator) / size**0.5
    mix = (mix + mix.roll(1, -1)) * torch.logspace(-0.5, 0.5, size)
    return mix.mT @ mix / 2 + 0.01 * torch.eye(size)


def greedy(weight: Tensor, hessian: Tensor, quant: QuantConfig, dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    codes, scales, zeros = quantize_columns(
        weight, factor(hessian, "site").matrix, None, None, None,
        bits=quant.bits, group_size=quant.group_size, sym=quant.sym, search=True, scale_dtype=dtype,
    )  # fmt: skip
    return QuantizedWeight(codes, scales, zeros, quant.bits)


def descend(weight: Tensor, start: QuantizedWeight, hessian: Tensor, passes: int) -> QuantizedWeight:
    codes, scales = coordinate_descent(
        weight, start.codes, start.scales, start.zeros, hessian, bits=start.bits, passes=passes
    )
    return QuantizedWeight(codes, scales, start.zeros, start.bits)


def loss(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> Tensor:
    """e H e^T of each row, float64 [E, N]."""
    error = (weight - quantized.dequantize()).double()
    return ((error @ hessian.double()) * error).sum(-1)


def by_the_book(weight: Tensor, start: QuantizedWeight, hessian: Tensor, sweeps: int) -> QuantizedWeight:
    """One unknown of one row at a time, in float64."""
    weight, hessian = weight.double(), hessian.double()
    codes, scales, zeros = start.codes.clone(), start.scales.clone(), start.zeros
    size, top = start.group_size, (1 << start.bits) - 1

    def error(row: int) -> Tensor:
        levels = codes[0, row].double() - zeros[0, row].double().repeat_interleave(size)
        return weight[0, row] - levels * scales[0, row].double().repeat_interleave(size)

    for row in range(weight.shape[1]):
        for group in list(range(scales.shape[-1])) * sweeps:
            at = slice(group * size, (group + 1) * size)
            scale, zero = scales[0, row, group].double(), zeros[0, row, group].double()
            for column in range(at.start, at.stop):
                others = error(row)
                others[column] = 0
                best = weight[0, row, column] + others @ hessian[0, :, column] / hessian[0, column, column]
                codes[0, row, column] = int((best / scale + zero).round().clamp(0, top))
            levels = codes[0, row, at].double() - zero
            new = scale + (error(row) @ hessian[0])[at] @ levels / (levels @ hessian[0, at, at] @ levels)
            if 1 / REACH < new / scale < REACH:
                scales[0, row, group] = new
    return QuantizedWeight(codes, scales, zeros, start.bits)


@pytest.mark.parametrize("quant", [QuantConfig(2, 16), QuantConfig(3, 32), QuantConfig(2, 16, sym=False)])
def test_it_is_coordinate_descent_by_the_book(quant, generator):
    weight, hessian = torch.randn(1, 12, 64, generator=generator), metric_of(1, 64, generator)
    start = greedy(weight, hessian, quant, torch.float32)
    actual, wanted = descend(weight, start, hessian, 2), by_the_book(weight, start, hessian, 2)
    assert torch.equal(actual.codes, wanted.codes)
    torch.testing.assert_close(actual.scales, wanted.scales, rtol=1e-4, atol=0)
    assert not torch.equal(actual.codes, start.codes) and torch.equal(actual.zeros, start.zeros)


@pytest.mark.parametrize(
    "quant", [QuantConfig(2, 16), QuantConfig(3, 64), QuantConfig(4, 32, sym=False), QuantConfig(8, 32)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_row_becomes_worse_and_each_sweep_helps(quant, dtype, generator):
    weight, hessian = torch.randn(3, 40, 64, generator=generator), metric_of(3, 64, generator)
    start = greedy(weight, hessian, quant, dtype)
    losses = [loss(weight, start, hessian)]
    for sweeps in (1, 2, 4):
        result = descend(weight, start, hessian, sweeps)
        assert result.scales.dtype == dtype and int(result.codes.max()) < 1 << quant.bits
        losses.append(loss(weight, result, hessian))
        assert (losses[-1] <= losses[0] * (1 + 1e-5)).all()
    totals = [float(each.sum()) for each in losses]
    assert totals == sorted(totals, reverse=True) and totals[1] < 0.99 * totals[0]


def test_in_the_end_no_code_can_be_bettered_by_itself(generator):
    weight, hessian = torch.randn(1, 6, 16, generator=generator), metric_of(1, 16, generator)
    result = descend(weight, greedy(weight, hessian, QuantConfig(2, 8)), hessian, 50)
    least = loss(weight, result, hessian)
    for column in range(16):
        for code in range(4):
            codes = result.codes.clone()
            codes[..., column] = code
            other = QuantizedWeight(codes, result.scales, result.zeros, 2)
            assert (loss(weight, other, hessian) >= least * (1 - 1e-5)).all()


@pytest.mark.parametrize("spoiled", [0.0, float("inf"), float("nan")])
def test_an_expert_without_a_metric_stays_and_disturbs_nobody(spoiled, generator):
    weight, hessian = torch.randn(3, 8, 32, generator=generator), metric_of(3, 32, generator)
    start = greedy(weight, hessian, QuantConfig(2, 16))
    alone = [descend(weight[e : e + 1], start.expert(e), hessian[e : e + 1], 2) for e in (0, 2)]
    hessian[1] = spoiled
    actual = descend(weight, start, hessian, 2)
    for expert, wanted in ((0, alone[0]), (1, start.expert(1)), (2, alone[1])):
        assert torch.equal(actual.expert(expert).codes, wanted.codes)
        assert torch.equal(actual.expert(expert).scales, wanted.scales)


def test_a_group_of_zeros_keeps_its_scale(generator):
    weight, hessian = torch.randn(1, 4, 32, generator=generator), metric_of(1, 32, generator)
    hessian[:, :16, 16:] = hessian[:, 16:, :16] = 0
    weight[..., :16] = 0
    start = greedy(weight, hessian, QuantConfig(3, 16))
    result = descend(weight, start, hessian, 2)
    assert torch.equal(result.scales[..., 0], start.scales[..., 0])
    assert (result.dequantize()[..., :16] == 0).all()


def test_the_solver_sweeps_as_often_as_it_is_told(generator):
    x = torch.randn(256, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    statistics = Statistics.zeros(1, 64)
    statistics.add(x)
    weight = torch.randn(1, 32, 64, generator=generator)
    errors = []
    for sweeps in (0, 1, 3):
        spec = MethodConfig("sarqc-gptq", reg_lambda=0.1, cd_passes=sweeps)
        _, report = solve_site("site", weight, statistics, QuantConfig(2, 32), spec, scale_dtype=torch.bfloat16)
        errors.append(report.error)
    assert errors == sorted(errors, reverse=True) and errors[1] < 0.97 * errors[0]


def test_what_cannot_be_swept_is_refused():
    with pytest.raises(ArgumentError, match="cd_passes = -1"):
        MethodConfig("sarqc-gptq", cd_passes=-1)
    with pytest.raises(ArgumentError, match=r"cd_passes = 2 .*'awq'"):
        MethodConfig("awq", cd_passes=2)


@pytest.mark.parametrize("rows", [(1, 2, 13), (64, 100, 31)], ids=str)
def test_rows_do_not_depend_on_those_beside(rows: tuple[int, ...], generator: torch.Generator) -> None:
    parts = [torch.randn(1, n, 96, generator=generator) * 0.02 for n in rows]
    hessian = metric_of(1, 96, generator)
    quant = QuantConfig(bits=3, group_size=32)
    whole = torch.cat(parts, 1)
    whole_solved = descend(whole, greedy(whole, hessian, quant), hessian, 2)
    for part, codes, scales in zip(parts, whole_solved.codes.split(rows, 1), whole_solved.scales.split(rows, 1)):
        alone = descend(part, greedy(part, hessian, quant), hessian, 2)
        assert torch.equal(alone.codes, codes) and torch.equal(alone.scales, scales)

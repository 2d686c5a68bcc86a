"""Quantize one layer: solver, fallback and report.

`solve_site` picks a `Solver` by the method, measures its error against RTN and rejects non-finite weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from sarqc.config import MethodConfig, QuantConfig
from sarqc.errors import NumericError
from sarqc.method.awq import Scaling
from sarqc.method.error_correction import corrected_target
from sarqc.method.gptq import solve_gptq
from sarqc.method.gram import Gram, Statistics, all_finite, prior_rows, shrink_experts
from sarqc.method.hessian import Objective
from sarqc.method.lambda_search import HeldOutValidation, LambdaChoice, LambdaSearch, Record
from sarqc.method.rtn import Solution, quantize_rtn, solve_rtn
from sarqc.method.weight import QuantizedWeight

SAMPLED_ROWS = 128
"""Rows of a matrix that the report's errors are measured on; all of them would cost as much as solving."""


class Solver(Protocol):
    """weight fp32 [E, N, K], the objective for its experts -> `Solution`.

    Pure: no state, no files, no random numbers. Rows are independent, and so are experts. The objective is that of the
    original weight; with a `scaling` the solution is that of the scaled weight.
    """

    def __call__(
        self,
        site: str,
        weight: Tensor,
        objective: Objective,
        quant: QuantConfig,
        method: MethodConfig,
        scale_dtype: torch.dtype,
        scaling: Scaling | None = None,
    ) -> Solution:
        """Quantize the weight of one site."""
        ...


SOLVERS: dict[str, Solver] = {"rtn": solve_rtn, "gptq": solve_gptq}


def choose_lambda(
    site: str,
    kind: str,
    weight: Callable[[], Tensor],
    statistics: Statistics,
    quant: QuantConfig,
    method: MethodConfig,
    *,
    scale_dtype: torch.dtype,
    search: LambdaSearch,
) -> LambdaChoice:
    """Lambda of every expert of a site: the given number, or the result of held-out validation
    (`method.lambda_search`).

    Args:
        site: Name of the site.
        kind: Sites of one kind share their validation curves.
        weight: Makes the weight [E, N, K], where the site is to be measured: without channel scales and coordinate
            descent, whose optimum has the same lambda.
        statistics: Of the site's inputs.
        quant: The number format.
        method: The method.
        scale_dtype: Dtype that scales are stored in.
        search: Curves so far; this site's is added.
    """
    once = replace(method, cd_passes=0)

    def quantize_rows(rows: Tensor, gram: Gram, reg_lambda: Tensor) -> Tensor:
        objective = Objective(gram, reg_lambda)
        return SOLVERS[once.solver](site, rows, objective, quant, once, scale_dtype).weight.dequantize()

    def rtn_rows(rows: Tensor) -> Tensor:
        return quantize_rtn(rows, quant, "minmax", scale_dtype).dequantize()

    def validation() -> HeldOutValidation:
        return HeldOutValidation(
            weight(), statistics, method.expert_shrinkage, search.seed, quantize_rows, rtn_rows, search.spread
        )

    held_out = validation if len(statistics.folds) > 1 else None
    return search.choose(kind, statistics.rows(), statistics.folds[0].sum.shape[-1], method, held_out)


def solve_site(
    site: str,
    weight: Tensor,
    statistics: Statistics | None,
    quant: QuantConfig,
    method: MethodConfig,
    *,
    scale_dtype: torch.dtype,
    scaling: Scaling | None = None,
    choice: LambdaChoice | None = None,
) -> tuple[QuantizedWeight, LayerReport]:
    """Quantize one site's weight [E, N, K] and report the error.

    Args:
        site: Name of the site.
        weight: [E, N, K].
        statistics: Of the site's inputs; None where the method is not calibrated.
        quant: The number format.
        method: The method.
        scale_dtype: Dtype that scales are stored in; they are rounded to it before any weight is quantized.
        scaling: Applied to the weight first. Statistics and errors stay those of the original weight.
        choice: The lambda, and the experts that `weight` and `scaling` cover; statistics cover all of them. Chosen for
            this site alone by default.

    Returns:
        The quantized weight and its report.

    Raises:
        NumericError: The weight is not finite; names the site.
        ArgumentError: The group size does not divide K.
    """
    began = time.perf_counter()
    quant.groups(weight.shape[-1])
    weight = weight.float()
    if not all_finite(weight):
        raise NumericError(f"{site}: its weight holds NaN or Inf; repair the checkpoint before quantizing it")
    gram, target, correction_share = None, weight, 0.0
    if statistics is None or not method.calibrated:
        solution = Solution(quantize_rtn(weight, quant, method.scales, scale_dtype), torch.zeros(1))
    else:
        whole = statistics.as_single_fold()  # once: with two folds it is a copy of what can be most of the memory
        choice = choice or choose_lambda(
            site, "", lambda: weight, statistics, quant, method, scale_dtype=scale_dtype, search=LambdaSearch()
        )
        gram = whole.folds[0].part(choice.experts)
        if not choice.rounded:
            target, correction_share = choice.target or corrected_target(
                site, weight, statistics, choice.reg_lambda, method
            )
        solution = _solve_chosen(site, target, whole, choice, quant, method, scale_dtype, scaling)
    sampled = torch.arange(0, weight.shape[1], -(-weight.shape[1] // SAMPLED_ROWS), device=weight.device)
    sample = target[:, sampled]
    rtn = quantize_rtn(sample, quant, "minmax", scale_dtype).dequantize()
    quantized = solution.weight.rows(sampled).dequantize()
    if scaling is not None:
        quantized = scaling.rows_at(sampled).undo(quantized)
    errors = _errors(sample, quantized, rtn, gram)
    unfactored = torch.isinf(solution.damping)
    shrunk = statistics is not None and (len(statistics.rows()) > 1 or bool(statistics.rest))
    report = LayerReport(
        site=site,
        rows=() if gram is None else tuple(gram.rows.tolist()),
        error=errors.error,
        rtn_error=errors.rtn_error,
        signal=errors.signal,
        reg_lambda=0.0 if choice is None or choice.rounded else float(choice.reg_lambda.max()),
        damping=float(solution.damping[~unfactored].max()) if bool((~unfactored).any()) else 0.0,
        fallback=_fallback(choice, unfactored),
        seconds=time.perf_counter() - began,
        exponent=0.0 if scaling is None else scaling.exponent,
        unscaled=None if scaling is None else scaling.unscaled,
        prior_rows=prior_rows(weight.shape[-1], method.expert_shrinkage) if shrunk else 0,
        correction_share=correction_share,
        held_out=choice.record() if choice else {},
        bits=quant.bits,
    )
    return solution.weight, report


def _solve_chosen(
    site: str,
    weight: Tensor,
    statistics: Statistics,
    choice: LambdaChoice,
    quant: QuantConfig,
    method: MethodConfig,
    scale_dtype: torch.dtype,
    scaling: Scaling | None,
) -> Solution:
    """The solution at the chosen lambda, or RTN."""
    if choice.rounded:
        scaled = weight if scaling is None else scaling.apply(weight)
        return Solution(quantize_rtn(scaled, quant, "minmax", scale_dtype), torch.zeros(len(weight)))
    gram = shrink_experts(statistics, method.expert_shrinkage, choice.experts)
    objective = Objective(gram, choice.reg_lambda[choice.experts], choice.factored)
    return SOLVERS[method.solver](site, weight, objective, quant, method, scale_dtype, scaling)


def _fallback(choice: LambdaChoice | None, unfactored: Tensor) -> str | None:
    if choice and choice.rounded:
        return choice.why
    if not bool(unfactored.any()):
        return None
    return f"{int(unfactored.sum())} of {unfactored.numel()} matrices have no factor at any damping: quantized by RTN"


def _errors(weight: Tensor, quantized: Tensor, rtn: Tensor, gram: Gram | None) -> LayerErrors:
    """Errors of two candidates for a weight, in fp32 products summed in fp64."""

    def energy(rows: Tensor) -> float:
        if gram is None:
            return float(rows.square().sum(dtype=torch.float64))
        return float((gram.energy(rows) / gram.rows.clamp(min=1)).sum())

    signal = max(energy(weight), torch.finfo(torch.float64).tiny)
    return LayerErrors(
        error=energy(weight - quantized) / signal, rtn_error=energy(weight - rtn) / signal, signal=signal
    )


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """Output errors of one site.

    Attributes:
        error: tr(E H E^T) / tr(T H T^T) over all experts, E = T - Q, with H without the regulariser (H = I where there
            is no Gram), on at most 128 evenly spaced rows of each matrix. The target T is the weight W, except where
            `correction_share` is not 0.
        rtn_error: The same for RTN of T with min-max scales.
        signal: tr(T H T^T), the denominator of both errors.
    """

    error: float
    rtn_error: float
    signal: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LayerReport(LayerErrors):
    """Result of one site.

    Attributes:
        site: Name of the site.
        rows: Calibration rows of each expert.
        reg_lambda: Largest lambda over experts.
        damping: Largest damping over experts.
        fallback: Why some experts were quantized by RTN, or None.
        seconds: Time spent.
        exponent: Of the channel scales, the mean over experts.
        unscaled: Why there are no channel scales although the method has them, or None.
        prior_rows: Rows of the pooled Gram added to each expert.
        correction_share: Share a of the residual error that T corrects (`method.error_correction`); 0 where T = W.
        held_out: How lambda was chosen, as `LambdaChoice.record` has it.
        bits: Of the codes.
    """

    site: str
    rows: tuple[int, ...]
    reg_lambda: float
    damping: float
    fallback: str | None
    seconds: float
    exponent: float = 0.0
    unscaled: str | None = None
    prior_rows: int = 0
    correction_share: float = 0.0
    held_out: Record = field(default_factory=dict)
    bits: int = 0


def merge_reports(parts: Sequence[LayerReport]) -> LayerReport:
    """One report of a site from those of parts of its experts, in their order; the only part itself.

    Errors are ratios of sums, so each part counts by its signal. Seconds are added up.
    """
    first, *others = parts
    if not others:
        return first
    signal = sum(part.signal for part in parts)
    experts = sum(len(part.rows) for part in parts)
    reasons = dict.fromkeys(part.fallback for part in parts if part.fallback)
    return replace(
        first,
        rows=tuple(row for part in parts for row in part.rows),
        error=sum(part.error * part.signal for part in parts) / signal,
        rtn_error=sum(part.rtn_error * part.signal for part in parts) / signal,
        reg_lambda=max(part.reg_lambda for part in parts),
        damping=max(part.damping for part in parts),
        fallback="; ".join(reasons) or None,
        seconds=sum(part.seconds for part in parts),
        exponent=sum(part.exponent * len(part.rows) for part in parts) / max(experts, 1),
        signal=signal,
    )

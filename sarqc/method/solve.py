"""From a weight and what is known of its inputs to codes, scales and zeros, with a record of how it went.

A `Solver` is any function of that shape; `solve_site` picks one by the spec, measures what it did against plain
rounding and refuses numbers that are not finite.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sarqc.errors import NumericError
from sarqc.method import objective
from sarqc.method.carry import shifted
from sarqc.method.channel_scale import Scaling
from sarqc.method.descent import descend
from sarqc.method.grid import search_grid
from sarqc.method.held_out import Judge
from sarqc.method.order import column_order
from sarqc.method.pooling import borrowing, kappa
from sarqc.method.report import SolveReport
from sarqc.method.statistics import Gram, Statistics
from sarqc.method.strength import Choice, Strengths
from sarqc.method.weight import QuantizedWeight
from sarqc.spec import AUTO, QuantSpec, SolveSpec
from sarqc_kernels.columns import fit_grid, quantize_columns, round_to_grid
from sarqc_kernels.columns.grid import GridRule

JUDGED_ROWS = 256
"""Rows of a matrix that the report's errors are measured on; all of them would cost as much as solving does."""


@dataclass(frozen=True)
class Solution:
    """What a solver returns: the weight, and the damping each expert needed (fp [E])."""

    weight: QuantizedWeight
    damping: Tensor


class Solver(Protocol):
    """weight fp32 [E, N, K], a Gram of its inputs, lambda of each expert fp32 [E] -> Solution.

    Pure: no state, no files, no random numbers. Rows do not know of each other, nor do experts.
    The Gram is that of the original inputs; with a `scaling` the solution is that of the scaled weight.
    """

    def __call__(
        self,
        site: str,
        weight: Tensor,
        gram: Gram,
        strength: Tensor,
        quant: QuantSpec,
        solve: SolveSpec,
        scale_dtype: torch.dtype,
        scaling: Scaling | None = None,
    ) -> Solution:
        """Quantize the weight of one site."""
        ...


def round_plainly(weight: Tensor, quant: QuantSpec, grid: str, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Every weight to its nearest code; the grid spans each group, or is searched for the least squared error."""
    group_size = quant.group_size if quant.group_size > 0 else weight.shape[-1]
    scales, zeros = fit_grid(
        weight,
        None,
        bits=quant.bits,
        group_size=group_size,
        sym=quant.sym,
        search=grid == "search",
        scale_dtype=scale_dtype,
    )
    return QuantizedWeight(round_to_grid(weight, scales, zeros, bits=quant.bits), scales, zeros, quant.bits)


def error_cost(site: str, gram: Gram, strength: Tensor, quant: QuantSpec, solve: SolveSpec) -> Tensor:
    """What the scale search judges errors by: the metric [E, K, K], or M_jj^2 [E, K] where the Gram solver follows."""
    metric = objective.metric(gram, strength, solve)
    if solve.solver == "round":
        return metric
    order = _order(metric, quant, solve)
    factor = objective.factor(metric if order is None else _permuted(metric, order), site)
    price = factor.matrix.diagonal(dim1=-2, dim2=-1).square()
    return price if order is None else torch.empty_like(price).scatter_(1, order, price)


def solve_round(
    site: str,
    weight: Tensor,
    gram: Gram,
    strength: Tensor,
    quant: QuantSpec,
    solve: SolveSpec,
    scale_dtype: torch.dtype,
    scaling: Scaling | None = None,
) -> Solution:
    """Every weight to its nearest code, on grids searched in the metric H + lambda D (`method.grid`)."""
    metric = objective.metric(gram, strength, solve)
    if scaling is not None:
        weight, metric = scaling.apply(weight), scaling.metric(metric)
    if solve.grid == "minmax":
        rounded = round_plainly(weight, quant, solve.grid, scale_dtype)
    else:
        rule = GridRule(quant.bits, quant.sym, True, scale_dtype)
        scales, zeros = search_grid(weight, metric, rule, weight.shape[-1] // quant.groups(weight.shape[-1]))
        codes = round_to_grid(weight, scales, zeros, bits=quant.bits)
        rounded = QuantizedWeight(codes, scales, zeros, quant.bits)
    return Solution(rounded, torch.zeros_like(strength))


def solve_gram(
    site: str,
    weight: Tensor,
    gram: Gram,
    strength: Tensor,
    quant: QuantSpec,
    solve: SolveSpec,
    scale_dtype: torch.dtype,
    scaling: Scaling | None = None,
) -> Solution:
    """Column by column with error feedback in the metric H + lambda D (GPTQ, arXiv 2210.17323, without an inverse).

    One factor M M^T of the metric gives both the feedback and, as M_jj^2, what an error in column j will cost; the
    searched grid is fitted with those weights. `solve.sweeps` then improve on all of it in the same metric.
    """
    group_size = quant.group_size if quant.group_size > 0 else weight.shape[-1]
    metric = objective.metric(gram, strength, solve)
    if scaling is not None:
        weight, metric = scaling.apply(weight), scaling.metric(metric)
    diagonal = metric.diagonal(dim1=-2, dim2=-1)
    order = _order(metric, quant, solve)
    search = solve.grid == "search"
    scales = zeros = None
    if solve.act_order == "static":
        scales, zeros = fit_grid(
            weight,
            diagonal.contiguous(),
            bits=quant.bits,
            group_size=group_size,
            sym=quant.sym,
            search=search,
            scale_dtype=scale_dtype,
        )
    factor = objective.factor(metric if order is None else _permuted(metric, order), site)
    codes, scales, zeros = quantize_columns(
        weight,
        factor.matrix,
        order,
        scales,
        zeros,
        bits=quant.bits,
        group_size=group_size,
        sym=quant.sym,
        search=search,
        scale_dtype=scale_dtype,
    )
    quantized, damping = QuantizedWeight(codes, scales, zeros, quant.bits), factor.damping
    if solve.sweeps:
        del factor
        diagonal += damping.to(diagonal)[:, None] * diagonal.mean(
            -1, keepdim=True
        )  # a view: the metric as it was factored
        quantized = descend(weight, quantized, metric, solve.sweeps)
    return Solution(quantized, damping)


SOLVERS: dict[str, Solver] = {"round": solve_round, "gram": solve_gram}


def choose_strength(
    site: str,
    kind: str,
    weight: Tensor,
    statistics: Statistics,
    quant: QuantSpec,
    solve: SolveSpec,
    *,
    scale_dtype: torch.dtype,
    strengths: Strengths,
) -> Choice:
    """lambda of every expert of a site: as asked for, or what held-out text says; see `method.strength`.

    weight: [E, N, K], tried without channel scales and without sweeps, which find their best at the same strengths.
    kind: which sites share their answers. strengths: answers so far; this site's is added.
    """
    judge = None
    if solve.strength == AUTO and len(statistics.folds) > 1:
        once = replace(solve, sweeps=0)

        def trial(rows: Tensor, gram: Gram, strength: Tensor) -> Tensor:
            return SOLVERS[once.solver](site, rows, gram, strength, quant, once, scale_dtype).weight.dequantize()

        def rounding(rows: Tensor) -> Tensor:
            return round_plainly(rows, quant, "minmax", scale_dtype).dequantize()

        judge = Judge(weight.float(), statistics, solve.borrow, solve.seed, trial, rounding)
    return strengths.choose(kind, statistics.rows(), weight.shape[-1], solve, judge)


def solve_site(
    site: str,
    weight: Tensor,
    statistics: Statistics | None,
    quant: QuantSpec,
    solve: SolveSpec,
    *,
    scale_dtype: torch.dtype,
    scaling: Scaling | None = None,
    choice: Choice | None = None,
    experts: slice = slice(None),
) -> tuple[QuantizedWeight, SolveReport]:
    """Quantize one site's weight [E, N, K] and say how well.

    statistics: of the site's inputs, or None for plain rounding (`solve.gram` False). scale_dtype: the dtype scales
    are stored in; they are rounded to it before any weight is. scaling: what is done to the weight first; statistics
    and errors are those of the original all the same. choice: of the strength, made for this site alone by default.
    experts: those of the site that `weight` and `scaling` are of; statistics and choice are of all of them.
    Raises `NumericError` naming the site where the weight is not finite, and `ArgumentError` where the group size does
    not divide K.
    """
    began = time.perf_counter()
    quant.groups(weight.shape[-1])
    weight = weight.float()
    if not bool(torch.isfinite(weight).all()):
        raise NumericError(f"{site}: its weight holds NaN or Inf; repair the checkpoint before quantizing it")
    gram, target, carried = None, weight, 0.0
    if statistics is None or not solve.gram:
        solution = Solution(round_plainly(weight, quant, solve.grid, scale_dtype), torch.zeros(1))
    else:
        whole = statistics.in_one()  # once: with two folds it is a copy of what can be most of the memory
        gram = whole.folds[0].part(experts)
        choice = choice or choose_strength(
            site, "", weight, statistics, quant, solve, scale_dtype=scale_dtype, strengths=Strengths()
        )
        if not choice.rounded:
            target, carried = shifted(site, weight, statistics, choice.strength, solve)
        solution = _solve_chosen(site, target, whole, choice, quant, solve, scale_dtype, scaling, experts)
    judged = torch.arange(0, weight.shape[1], -(-weight.shape[1] // JUDGED_ROWS), device=weight.device)
    sample = target[:, judged]
    plain = round_plainly(sample, quant, "minmax", scale_dtype).dequantize()
    quantized = solution.weight.rows(judged).dequantize()
    if scaling is not None:
        quantized = scaling.rows_at(judged).undo(quantized)
    signal, (error, rounding_error) = _relative_errors(sample, [quantized, plain], gram)
    unfactored = torch.isinf(solution.damping)
    report = SolveReport(
        site=site,
        rows=() if gram is None else tuple(gram.rows.tolist()),
        error=error,
        rounding_error=rounding_error,
        strength=0.0 if choice is None or choice.rounded else float(choice.strength.max()),
        damping=float(solution.damping[~unfactored].max()) if bool((~unfactored).any()) else 0.0,
        fallback=_fallback(choice, unfactored),
        seconds=time.perf_counter() - began,
        exponent=0.0 if scaling is None else scaling.exponent,
        unscaled=None if scaling is None else scaling.unscaled,
        borrowed_rows=0 if statistics is None or len(statistics.rows()) == 1 else kappa(weight.shape[-1], solve.borrow),
        carried=carried,
        held_out=choice.record() if choice else {},
        signal=signal,
        bits=quant.bits,
    )
    return solution.weight, report


def _solve_chosen(
    site: str,
    weight: Tensor,
    statistics: Statistics,
    choice: Choice,
    quant: QuantSpec,
    solve: SolveSpec,
    scale_dtype: torch.dtype,
    scaling: Scaling | None,
    experts: slice,
) -> Solution:
    """The solution at the chosen strength, or plain rounding."""
    if choice.rounded:
        scaled = weight if scaling is None else scaling.apply(weight)
        return Solution(round_plainly(scaled, quant, "minmax", scale_dtype), torch.zeros(len(weight)))
    gram = borrowing(statistics, solve.borrow, experts)
    solver = SOLVERS[solve.solver]
    return solver(site, weight, gram, choice.strength[experts], quant, solve, scale_dtype, scaling)


def _fallback(choice: Choice | None, unfactored: Tensor) -> str | None:
    if choice and choice.rounded:
        return choice.why
    if not bool(unfactored.any()):
        return None
    return f"{int(unfactored.sum())} of {unfactored.numel()} matrices have no factor at any damping: rounded plainly"


def _relative_errors(weight: Tensor, candidates: list[Tensor], gram: Gram | None) -> tuple[float, list[float]]:
    """tr(W H W^T), and tr(E H E^T) over it for each candidate, in fp32 products summed in fp64."""
    hessian = None if gram is None else gram.hessian()

    def energy(rows: Tensor) -> float:
        passed = rows if hessian is None else rows @ hessian
        return float((passed * rows).sum(-1).double().sum())

    signal = max(energy(weight), torch.finfo(torch.float64).tiny)
    return signal, [energy(weight - candidate) / signal for candidate in candidates]


def _order(metric: Tensor, quant: QuantSpec, solve: SolveSpec) -> Tensor | None:
    group_size = quant.group_size if quant.group_size > 0 else metric.shape[-1]
    return column_order(metric.diagonal(dim1=-2, dim2=-1), group_size, solve.act_order)


def _permuted(metric: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of each matrix [E, K, K] in `order` [E, K]."""
    rows = metric.gather(1, order[:, :, None].expand_as(metric))
    return rows.gather(2, order[:, None, :].expand_as(metric))

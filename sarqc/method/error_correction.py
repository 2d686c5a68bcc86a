"""Residual error correction: one layer of a block corrects the drift of the residual stream from the reference model.

Errors of a layer reach all later layers, and no solve on a layer's own inputs sees them: the residual stream of the
quantized model drifts. A layer that writes to the residual stream without a norm in between, the last of the block if
there is one, can correct that. Its inputs Y are known, and so is the residual error R, row by row. With a share a of R
as the target:

    F(Q) = |Y Q^T - (Y W^T + a R)|^2 / rows + lambda tr[(Q - W) D (Q - W)^T]

Completing the square gives the objective of every other layer, around another target:

    F(Q) = tr[(Q - T) H (Q - T)^T] + const,    T = W + a C H^-1,    C = R^T Y / rows,    H = Y^T Y / rows + lambda D

So any solver takes T in place of W, and one lambda regularises both the rounding and the shift. With R = (X - Y) W^T, X
the inputs in the reference model, this is the target of QEP (arXiv 2504.09629). The share that is best on held-out text
has a closed form: with V = C_A H_A^-1 fitted on fold A, on fold B it is tr(C_B V^T) / tr(V (Y^T Y / rows)_B V^T).

Rows of W that are zero stay zero: pruned, merged and expanded models have them on purpose. For the same reason a shift
is at most as large as W, in the Frobenius norm: a layer that does next to nothing is not given the work of another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sarqc.config import MethodConfig
from sarqc.method.gram import Statistics
from sarqc.method.hessian import Objective, factor

CAUTION = 0.5
"""Part of the best share that is used. The loss is a parabola in a: half of the best share has three quarters of the
gain on text like the folds; on other text, whose best share is smaller, the second half does harm (measured in
`benchmarks/quality/ABLATIONS.md`).
"""


def corrected_target(
    site: str, weight: Tensor, statistics: Statistics, reg_lambda: Tensor, method: MethodConfig
) -> tuple[Tensor, float]:
    """The target T fp32 [1, N, K] and its share a, from 0 to `CAUTION`; the weight itself where a is 0.

    weight: fp32 [1, N, K]. reg_lambda: fp32 [1]. a is 0 where the statistics have no `cross_gram`, or one fold and so
    no held-out text, and where the weight is zero.
    """
    if statistics.folds[0].cross_gram is None or len(statistics.folds) < 2:
        return weight, 0.0
    share = correction_share(fold_fits(site, statistics, reg_lambda, method, range(len(statistics.folds))))
    change, sums = weight_change(site, weight, Objective(statistics.total(), reg_lambda), method, share)
    return limited_target(weight, change, sums, share)


def weight_change(
    site: str, weight: Tensor, objective: Objective, method: MethodConfig, share: float
) -> tuple[Tensor, Tensor]:
    """What a share of the error changes of the weight [1, N, K], and the squared norms of change and weight, float64
    [2]. Rows do not depend on each other; those that are zero stay so. objective: with the factor of its Hessian, in
    the order of the inputs, where that is made already."""
    change = torch.zeros_like(weight)
    if share and bool((weight != 0).any()):
        change = share * correction(site, objective, method)
        change = change.where((weight != 0).any(-1, keepdim=True), 0)
    return change, torch.stack([each.square().sum(dtype=torch.float64) for each in (change, weight)]).cpu()


def limited_target(weight: Tensor, change: Tensor, sums: Tensor, share: float) -> tuple[Tensor, float]:
    """The target and its share, with a change no larger than the weight. sums: squared norms of both, of all rows."""
    changed, whole = sums.tolist()
    part = min(1.0, (whole / changed) ** 0.5) if changed > 0 else 0.0
    return (weight + part * change, part * share) if part else (weight, 0.0)


SHARE_ROWS = 128
"""Rows of the weight that the share is estimated from: it is one number, and each row is a sample of it."""


def correction(site: str, objective: Objective, method: MethodConfig, step: int = 1) -> Tensor:
    """Every `step`-th row of C H^-1, fp32 [1, N / step, K], by two triangular solves; H includes the regulariser."""
    upper = (objective.factored or factor(objective.hessian(method), site)).matrix
    half = torch.linalg.solve_triangular(upper.mT, objective.gram.cross_mean(step), upper=False, left=False)
    full: Tensor = torch.linalg.solve_triangular(upper, half, upper=True, left=False)
    return full


def fold_fits(
    site: str, statistics: Statistics, reg_lambda: Tensor, method: MethodConfig, folds: Sequence[int]
) -> Tensor:
    """Of the shift that is fitted on each of these folds, its correlation with the error on all others and its energy
    there, float64 [folds, 2]; from at most `SHARE_ROWS` evenly spaced rows."""
    first, *_ = statistics.folds
    assert first.cross_gram is not None
    step = -(-first.cross_gram.shape[1] // SHARE_ROWS)
    fitted = []
    for number in folds:
        fit = correction(site, Objective(statistics.folds[number], reg_lambda), method, step)
        correlation = energy = 0.0
        for held_out in (fold for at, fold in enumerate(statistics.folds) if at != number):
            correlation += float((held_out.cross_mean(step) * fit).sum(dtype=torch.float64))
            energy += float(((fit @ held_out.second_moment()) * fit).sum(dtype=torch.float64))
        fitted.append((correlation, energy))
    return torch.tensor(fitted, dtype=torch.float64)


def correction_share(fitted: Tensor) -> float:
    """The share a of the error to correct: of what is best on held-out folds, over all pairs of folds, clipped to 0 ..
    1, the part `CAUTION`. fitted: the `fold_fits` of all folds."""
    correlation, energy = fitted.sum(0).tolist()
    return CAUTION * min(max(correlation / energy, 0.0), 1.0) if energy > 0 else 0.0

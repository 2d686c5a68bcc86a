"""Making up for the errors of earlier blocks: a target that gives, on what the quantized model feeds this site, more of
what the original model would have given.

With X what the original model feeds the site, Y what the quantized one does, and a share a of the difference wanted,

    F(Q) = |Y Q^T - (Y + a (X - Y)) W^T|^2 / rows + lambda tr[(Q - W) D (Q - W)^T]

Completing the square gives back the objective of every other solve, around another target:

    F(Q) = tr[(Q - T) H (Q - T)^T] + const,    T = W + a W Delta H^-1,
    H = Y^T Y / rows + lambda D,    Delta = (X - Y)^T Y / rows

so any solver takes T in W's place and the same lambda holds both the rounding and the shift (a is QEP's factor, arXiv
2504.09629, with the damping of the solve; the anchor of the pull stays W). How much of the shift survives on other text
has a closed form: with V = W Delta_A H_A^-1 fitted on fold A, the share that is best on fold B is
tr(W Delta_B V^T) / tr(V (Y^T Y / rows)_B V^T).
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from sarqc.method import objective
from sarqc.method.statistics import Gram, Statistics
from sarqc.spec import SolveSpec

ROWS = 96
"""Rows of a matrix that the share is judged on."""


def shifted(
    site: str, weight: Tensor, statistics: Statistics, strength: Tensor, solve: SolveSpec
) -> tuple[Tensor, float]:
    """The target T fp32 [E, N, K] and its share a, from 0 to 1; the weight itself where a is 0.

    weight: fp32 [E, N, K]. strength: lambda of each expert, fp32 [E]. a is 0 where the statistics hold no cross-Gram
    (experts, whose tokens the two models may route apart) or only one fold, on which it could not be judged.
    """
    if statistics.folds[0].cross is None or len(statistics.folds) < 2:
        return weight, 0.0
    some = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(solve.seed))[:ROWS].sort().values
    share = held_out_share(site, weight[:, some.to(weight.device)], statistics, strength, solve)
    if share == 0:
        return weight, 0.0
    return weight + share * shift(site, weight, statistics.total(), strength, solve), share


def shift(site: str, weight: Tensor, gram: Gram, strength: Tensor, solve: SolveSpec) -> Tensor:
    """W Delta H^-1, fp32 [E, N, K], by two triangular solves; H holds the regulariser."""
    upper = objective.factor(objective.metric(gram, strength, solve), site).matrix
    half = torch.linalg.solve_triangular(upper.mT, weight @ gram.drift(), upper=False, left=False)
    full: Tensor = torch.linalg.solve_triangular(upper, half, upper=True, left=False)
    return full


def held_out_share(site: str, weight: Tensor, statistics: Statistics, strength: Tensor, solve: SolveSpec) -> float:
    """The a that serves best on folds the shift was not fitted on, over all pairs of folds, clipped to 0 .. 1."""
    wanted = given = 0.0
    for fitted, judging in permutations(statistics.folds, 2):
        fit = shift(site, weight, fitted, strength, solve)
        wanted += float(((weight @ judging.drift()) * fit).sum(dtype=torch.float64))
        given += float(((fit @ judging.hessian()) * fit).sum(dtype=torch.float64))
    return min(max(wanted / given, 0.0), 1.0) if given > 0 else 0.0

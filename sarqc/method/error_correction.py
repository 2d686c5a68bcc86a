"""One layer of a block makes up for what the model has drifted from the original up to the place where it writes.

Errors of a layer reach all layers behind it, and no solve on a layer's own inputs sees them: the stream in a block is
off by what the blocks before it, and the layers in it, have done wrong. A layer whose outputs join that stream as they
are, the last one of the block if it is such a layer, can put that right. Its inputs Y are known, and so is R, what the
stream behind it lacks of the original's row by row; a share a of R can be asked of it:

    F(Q) = |Y Q^T - (Y W^T + a R)|^2 / rows + lambda tr[(Q - W) D (Q - W)^T]

Completing the square gives back the objective of every other method, around another target:

    F(Q) = tr[(Q - T) H (Q - T)^T] + const,    T = W + a C H^-1,    C = R^T Y / rows,    H = Y^T Y / rows + lambda D

so any solver takes T in W's place and the same lambda holds both the rounding and the shift (with R = (X - Y) W^T, X
the original's inputs, this is QEP's target, arXiv 2504.09629). How much of the shift survives on other text has a
closed form: with V = C_A H_A^-1 fitted on fold A, the share that is best on fold B is
tr(C_B V^T) / tr(V (Y^T Y / rows)_B V^T).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sarqc.config import MethodConfig
from sarqc.method.gram import Gram, Statistics
from sarqc.method.hessian import factor, regularised_hessian

CAUTION = 0.5
"""Part of the best share that is taken. Losses are parabolas in a: half of the best share has three quarters of its
gain on text like that of the folds, and on other text, where less is right, it is the second half that does harm
(measured in `benchmarks/quality/STRENGTH.md`)."""


def shifted(
    site: str, weight: Tensor, statistics: Statistics, reg_lambda: Tensor, method: MethodConfig
) -> tuple[Tensor, float]:
    """The target T fp32 [1, N, K] and its share a, from 0 to `CAUTION`; the weight itself where a is 0.

    weight: fp32 [1, N, K]. reg_lambda: lambda, fp32 [1]. a is 0 where the statistics hold no wish (the site has
    no joint) or only one fold, on which it could not be judged.
    """
    if statistics.folds[0].cross_gram is None or len(statistics.folds) < 2:
        return weight, 0.0
    share = CAUTION * held_out_share(site, statistics, reg_lambda, method)
    if share == 0:
        return weight, 0.0
    return weight + share * shift(site, statistics.total(), reg_lambda, method), share


def shift(site: str, gram: Gram, reg_lambda: Tensor, method: MethodConfig) -> Tensor:
    """C H^-1, fp32 [1, N, K], by two triangular solves; H holds the regulariser."""
    upper = factor(regularised_hessian(gram, reg_lambda, method), site).matrix
    half = torch.linalg.solve_triangular(upper.mT, gram.cross_mean(), upper=False, left=False)
    full: Tensor = torch.linalg.solve_triangular(upper, half, upper=True, left=False)
    return full


def held_out_share(site: str, statistics: Statistics, reg_lambda: Tensor, method: MethodConfig) -> float:
    """The a that serves best on folds the shift was not fitted on, over all pairs of folds, clipped to 0 .. 1."""
    wished = given = 0.0
    for fitted in statistics.folds:
        fit = shift(site, fitted, reg_lambda, method)
        for held_out in (fold for fold in statistics.folds if fold is not fitted):
            wished += float((held_out.cross_mean() * fit).sum(dtype=torch.float64))
            given += float(((fit @ held_out.second_moment()) * fit).sum(dtype=torch.float64))
    return min(max(wished / given, 0.0), 1.0) if given > 0 else 0.0

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

import torch
from torch import Tensor

from sarqc.config import MethodConfig
from sarqc.method.gram import Gram, Statistics
from sarqc.method.hessian import factor, regularised_hessian

CAUTION = 0.5
"""Part of the best share that is used. The loss is a parabola in a: half of the best share has three quarters of the
gain on text like the folds; on other text, whose best share is smaller, the second half does harm (measured in
`benchmarks/quality/ABLATIONS.md`).
"""


def shifted(
    site: str, weight: Tensor, statistics: Statistics, reg_lambda: Tensor, method: MethodConfig
) -> tuple[Tensor, float]:
    """The target T fp32 [1, N, K] and its share a, from 0 to `CAUTION`; the weight itself where a is 0.

    weight: fp32 [1, N, K]. reg_lambda: fp32 [1]. a is 0 where the statistics have no `cross_gram`, or one fold and so
    no held-out text, and where the weight is zero.
    """
    if statistics.folds[0].cross_gram is None or len(statistics.folds) < 2:
        return weight, 0.0
    alive = (weight != 0).any(-1, keepdim=True)
    if not bool(alive.any()):
        return weight, 0.0
    share = CAUTION * held_out_share(site, statistics, reg_lambda, method)
    if share == 0:
        return weight, 0.0
    change = (share * shift(site, statistics.total(), reg_lambda, method)).where(alive, 0)
    part = float(weight.norm() / change.norm())
    return (weight + change, share) if part >= 1 else (weight + part * change, part * share)


SHARE_ROWS = 128
"""Rows of the weight that tell the share: it is one number, and each row is a sample of it."""


def shift(site: str, gram: Gram, reg_lambda: Tensor, method: MethodConfig, each: int = 1) -> Tensor:
    """Each so manieth row of C H^-1, fp32 [1, N, K], by two triangular solves; H includes the regulariser."""
    upper = factor(regularised_hessian(gram, reg_lambda, method), site).matrix
    half = torch.linalg.solve_triangular(upper.mT, gram.cross_mean(each), upper=False, left=False)
    full: Tensor = torch.linalg.solve_triangular(upper, half, upper=True, left=False)
    return full


def held_out_share(site: str, statistics: Statistics, reg_lambda: Tensor, method: MethodConfig) -> float:
    """The share a that is best on held-out folds, over all pairs of folds, clipped to 0 .. 1; told by `SHARE_ROWS` rows
    or a few less, evenly spaced."""
    correlation = energy = 0.0
    first, *_ = statistics.folds
    assert first.cross_gram is not None
    each = -(-first.cross_gram.shape[1] // SHARE_ROWS)
    for fitted in statistics.folds:
        fit = shift(site, fitted, reg_lambda, method, each)
        for held_out in (fold for fold in statistics.folds if fold is not fitted):
            correlation += float((held_out.cross_mean(each) * fit).sum(dtype=torch.float64))
            energy += float(((fit @ held_out.second_moment()) * fit).sum(dtype=torch.float64))
    return min(max(correlation / energy, 0.0), 1.0) if energy > 0 else 0.0

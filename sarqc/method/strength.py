"""Which lambda. For now a fixed rule in the ratio of inputs to rows; folds of the Gram are there for a better one.

With few rows the Gram's small eigenvalues are mostly sampling error, and the solver spends its freedom exactly there;
the fewer rows per input, the stronger the pull to the original weights has to be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sarqc.method.statistics import Gram
from sarqc.spec import AUTO, SolveSpec, saliency_exponent

WEAKEST, STRONGEST = 0.03, 3.0


def choose(gram: Gram, solve: SolveSpec) -> Tensor:
    """lambda for each expert, fp32 [E]: the number that was asked for, or by rule c * (K / rows)^0.6 within bounds.

    The exponent is a fit to simulated layers whose true covariance is known. c grows from 0.5 to 1.5 with the
    saliency's exponent: a regulariser that spares the weak inputs must be stronger to hold the rest as firmly.
    """
    experts, in_features = gram.abs_sum.shape
    if solve.strength != AUTO:
        return torch.full((experts,), float(solve.strength), device=gram.sum.device)
    exponent = saliency_exponent(solve.saliency)
    constant = 0.5 + 1.0 * min(max((0.5 if exponent is None else exponent) - 0.5, 0.0), 0.5) / 0.5
    scarcity = in_features / gram.rows.clamp(min=1).float()
    return (constant * scarcity**0.6).clamp(WEAKEST, STRONGEST)

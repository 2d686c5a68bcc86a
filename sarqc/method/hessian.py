"""The objective: output error plus a penalty on changes of the weights, as one quadratic form.

    F(Q) = tr[(W - Q) (H + lambda D) (W - Q)^T],    H = X^T X / rows,    D = diag(d)

d_j grows with the saliency of input j (`saliency`), with mean(d) = mean(diag H). So lambda has no unit: it does not
depend on the scale or number of the activations, nor on the bits. Both terms have one form, so GPTQ only factors
another matrix (arXiv 2605.05693; the choice of d and of its scale is ours).

`hessian` is what is factored: H + lambda D + damping. `gram` is the raw sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sarqc.config import MethodConfig
from sarqc.errors import NumericError
from sarqc.kinds import saliency_exponent
from sarqc.method.gram import Gram
from sarqc_kernels.gram import cholesky_upper, gram_finalize

SALIENCY_FLOOR = 1e-4
"""Least saliency relative to the mean: inputs that calibration never excited keep their weights."""

DAMP_LADDER = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
"""Damping relative to the mean of the diagonal; tried in order, in fp64, until a factor exists."""


def saliency(diagonal: Tensor, abs_mean: Tensor, kind: str) -> Tensor:
    """The regulariser's diagonal d, fp32 [E, K], scaled to mean(d) = mean(diag H) (1 for an expert without rows).

    diagonal: of H, [E, K]. abs_mean: E|x_j|, [E, K]. kind: as `MethodConfig.saliency`.
    """
    scale = _mean_or_one(diagonal)
    exponent = saliency_exponent(kind)
    if exponent is None:
        base = abs_mean / _mean_or_one(abs_mean)
        exponent = 1.0
    else:
        base = diagonal / scale
    salient = base.clamp(min=SALIENCY_FLOOR) ** exponent
    return scale * salient / salient.mean(-1, keepdim=True)


@dataclass(frozen=True)
class Objective:
    """What a solver minimises over the codes of each expert: tr[(W - Q) (H + lambda D) (W - Q)^T].

    Attributes:
        gram: Of the original inputs.
        reg_lambda: Lambda of each expert, fp32 [E].
        factored: The factor that the solver "gptq" needs, where it is made already.
    """

    gram: Gram
    reg_lambda: Tensor
    factored: Factor | None = None

    def hessian(self, method: MethodConfig) -> Tensor:
        """H + lambda D + damp * mean(diag H) I of `method`, fp32 [E, K, K], in memory of its own, without a host
        sync."""
        salience = saliency(self.gram.diagonal(), self.gram.abs_mean(), method.saliency)
        return gram_finalize(self.gram.sum, self.gram.rows, salience, self.reg_lambda, method.damp)


@dataclass(frozen=True)
class Factor:
    """matrix: upper triangular M [E, K, K] with M M^T = H + damping * mean(diag H) I. damping: float64 [E].

    Where no damping gives a factor, the matrix is the square root of the diagonal (columns do not correct each other,
    which is RTN) and `damping` is infinite.
    """

    matrix: Tensor
    damping: Tensor


def factor(hessian: Tensor, site: str) -> Factor:
    """Factor each matrix of a batch [E, K, K] as M M^T with M upper triangular, by one Cholesky of the flipped matrix.

    fp32 first; matrices that fail are retried in fp64 with increasing damping.

    Raises:
        NumericError: A matrix is not finite; names `site`.
    """
    if not bool(torch.isfinite(hessian.diagonal(dim1=-2, dim2=-1)).all()):
        raise NumericError(f"{site}: the Gram matrix of its inputs is not finite; look for NaN or Inf in activations")
    matrix, info = cholesky_upper(hessian)
    damping = torch.zeros(hessian.shape[0], dtype=torch.float64)
    failed = (info != 0) | ~torch.isfinite(matrix.diagonal(dim1=-2, dim2=-1)).all(-1)
    for expert in failed.nonzero().flatten().tolist():
        matrix[expert], damping[expert] = _factor_in_double(hessian[expert])
    return Factor(matrix, damping)


def _factor_in_double(hessian: Tensor) -> tuple[Tensor, float]:
    double = hessian.double()
    mean = double.diagonal().mean()
    for damp in DAMP_LADDER:
        shifted = double + damp * mean * torch.eye(double.shape[0], dtype=torch.float64, device=double.device)
        lower, info = torch.linalg.cholesky_ex(shifted.flip(-1, -2))
        if int(info) == 0:
            return lower.flip(-1, -2).float(), damp
    return hessian.diagonal().clamp(min=torch.finfo(torch.float32).tiny).sqrt().diag(), float("inf")


def _mean_or_one(values: Tensor) -> Tensor:
    """Mean over the last axis, kept; 1 where it is zero, so that an expert without rows needs no case of its own."""
    mean = values.mean(-1, keepdim=True)
    return torch.where(mean > 0, mean, torch.ones_like(mean))

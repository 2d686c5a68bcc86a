"""What ranks find out together of a layer that writes to the residual, before each of them quantizes some of its rows.

Its share of the residual error is fitted on every fold, and its Hessian is factored in two orders: of its inputs for
the correction, of the solver's columns for the codes. None of these needs another, so each is made on one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sarqc.config import MethodConfig, QuantConfig
from sarqc.method.error_correction import correction_share, fold_fits
from sarqc.method.gptq import solver_factor
from sarqc.method.gram import Statistics, merged, strips
from sarqc.method.hessian import Factor, Objective, factor
from sarqc.pipeline.comm import Comm, exchange


@dataclass(frozen=True)
class Correction:
    """share: of the residual error that a layer corrects. plain, ordered: factors of its Hessian in the order of the
    inputs and of the solver's columns, where ranks have shared out making them."""

    share: float = 0.0
    plain: Factor | None = None
    ordered: Factor | None = None


@dataclass(frozen=True)
class Layer:
    """A layer that writes to the residual, of which all ranks have the statistics. reg_lambda: fp32 [1]."""

    name: str
    statistics: Statistics
    reg_lambda: Tensor
    quant: QuantConfig
    method: MethodConfig


def correction_of(layer: Layer, comm: Comm, *, factors: bool) -> Correction:
    """The correction of a layer; with `factors`, which take the memory of two Hessians, those too."""
    folds = layer.statistics.folds
    makers = _makers(layer) if factors else []

    def own() -> tuple[
        tuple[dict[int, Factor], list[Tensor]], tuple[dict[int, Tensor], dict[int, tuple[bool, Tensor]]]
    ]:
        fits = {
            number: fold_fits(layer.name, layer.statistics, layer.reg_lambda, layer.method, [number])
            for number in range(len(folds))
            if number % comm.size == comm.rank
        }
        made = {number: make() for number, make in enumerate(makers) if (len(folds) + number) % comm.size == comm.rank}
        blank = [torch.zeros_like(folds[0].sum) for number in range(len(makers)) if number not in made]
        return (made, blank), (fits, {number: (_transposed(each), each.damping) for number, each in made.items()})

    (made, blank), gathered = exchange(comm, own)
    fits = {number: fit for part, _ in gathered for number, fit in part.items()}
    layouts = {number: layout for _, part in gathered for number, layout in part.items()}
    received = []
    for number in sorted(layouts):
        transposed, damping = layouts[number]
        if number not in made:
            matrix = blank.pop()
            made[number] = Factor(matrix.mT if transposed else matrix, damping)
        received.append(_broadcast(made[number], comm, (len(folds) + number) % comm.size))
    return Correction(correction_share(torch.cat([fits[number] for number in sorted(fits)])), *received)


def _makers(layer: Layer) -> list[Callable[[], Factor]]:
    """What makes the factors: the plain one, and that of the solver where it is ours."""

    def objective() -> Objective:
        grams = (replace(fold, cross_gram=None) for fold in layer.statistics.folds)
        return Objective(merged(grams), layer.reg_lambda)

    def plain() -> Factor:
        return factor(objective().hessian(layer.method), layer.name)

    def ordered() -> Factor:
        return solver_factor(layer.name, objective(), layer.quant, layer.method)

    return [plain, ordered] if layer.method.solver == "gptq" else [plain]


def _transposed(factored: Factor) -> bool:
    """Whether columns lie in one piece. On a CPU a product with another layout can sum in another order."""
    return factored.matrix.stride(-1) != 1


def _broadcast(factored: Factor, comm: Comm, owner: int) -> Factor:
    """The factor of `owner` on every rank: only its upper triangle is sent."""
    matrix = factored.matrix
    comm.broadcast([matrix[:, first:last, first:] for first, last in strips(matrix.shape[-1])], owner)
    return factored

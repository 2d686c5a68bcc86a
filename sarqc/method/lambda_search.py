"""Choose lambda: held-out validation on two folds of the calibration text, pooled over depth.

With few rows the small eigenvalues of the Gram are mostly sampling error, and an unregularised solver overfits them.
The Grams of two parts of the text are kept apart, so the right lambda can be measured: quantize with the Gram of one
fold, measure the output error with the other. Of all lambdas within `TOLERANCE` of the least validation loss the
largest is taken, because both folds come from one text and the text at inference does not.

The validation curve of one site is noisy. Sites of one kind (all q/k/v, all down_proj, ...) have about the same
optimum, so their curves are pooled over depth. Blocks are quantized in order, so the pool holds the blocks so far. To
save time only some sites are measured. `benchmarks/quality/ABLATIONS.md` has the measurements behind the constants.

`HeldOutValidation` uses a random sample of rows: rows of a weight are independent. Several lambdas are stacked on the
expert axis and cost one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import log, log10
from typing import Any

import torch
from torch import Tensor

from sarqc.config import AUTO, MethodConfig
from sarqc.kinds import PRIOR, saliency_exponent
from sarqc.method.gram import Gram, Statistics, shrink_gram
from sarqc.method.hessian import Factor

GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Candidates for lambda. The loss is flat around its minimum: half a decade is fine enough."""
MEASURED_FIRST, MEASURED_EVERY = 4, 6
"""The first `MEASURED_FIRST` sites of a kind are measured, then every `MEASURED_EVERY`-th."""
TOLERANCE = 0.03
"""The largest lambda whose pooled log loss is within this of the least is taken. On text of the same kind the cost is
not measurable; on text of another kind the larger lambda can be better.
"""
PRIOR_BEND = 0.03
"""Log loss that the prior assigns to one step of the grid (half a decade) away from its own lambda."""

RTN = -1.0
"""Stands for RTN among candidates for lambda."""

Curve = Mapping[float, float]
"""lambda -> loss on held-out text, relative to that of RTN on a min-max grid."""
Record = Mapping[str, Any]


@dataclass(frozen=True)
class LambdaChoice:
    """The lambda of one site.

    Attributes:
        reg_lambda: Lambda of each expert, fp32 [E].
        rounded: Whether held-out text prefers RTN to any lambda.
        kind: Kind of the site; sites of one kind share their curves.
        curve: Validation curve of this site; empty where it was not measured.
        why: The reason, in words.
        by_prior: Whether `reg_lambda` is the prior's, which depends on the rows of each expert.
        experts: Experts to quantize with it; by default all that `reg_lambda` covers.
        target: What to quantize in the weight's place and the share of the residual error that it corrects, where they
            are known by now (`method.error_correction`).
        factored: As in `Objective`.
    """

    reg_lambda: Tensor
    rounded: bool
    kind: str
    curve: Curve
    why: str
    by_prior: bool = False
    experts: slice = field(default_factory=lambda: slice(None))
    target: tuple[Tensor, float] | None = None
    factored: Factor | None = None

    def of_others(self, rows: Tensor, in_features: int, method: MethodConfig) -> LambdaChoice:
        """The choice for other experts of the same layer, without measuring them: the same lambda, or the same prior.

        rows: calibration rows of those experts, int64 [E].
        """
        prior = prior_lambda(rows, in_features, method)
        reg_lambda = prior if self.by_prior else torch.full_like(prior, float(self.reg_lambda[0]))
        return replace(self, reg_lambda=reg_lambda)

    def record(self) -> Record:
        """Kind, reason and curve, as JSON values: what `LambdaSearch.restored` reads."""
        return {"kind": self.kind, "why": self.why, "curve": [list(point) for point in self.curve.items()]}


Spread = Callable[[int, Callable[[Sequence[int]], Tensor]], Tensor]
"""spread(count, work) -> values [count, ...] of tasks 0 .. count - 1; work(tasks) has those of some tasks, in order."""


def alone(count: int, work: Callable[[Sequence[int]], Tensor]) -> Tensor:
    """All tasks here: the `Spread` of one process."""
    return work(range(count))


@dataclass
class KindCurves:
    """Sites of one kind so far. seen: how many. curves: validation curves of those that were measured."""

    seen: int = 0
    curves: list[Curve] = field(default_factory=list)

    @property
    def measures_next(self) -> bool:
        """Whether the next site is measured."""
        return self.seen < MEASURED_FIRST or self.seen % MEASURED_EVERY == 0


@dataclass
class LambdaSearch:
    """Validation curves of a run so far, by kind of site. `choose` reads them and adds to them.

    Apart from the seed of the row sample it holds only the curves, so an interrupted run restores it from its reports.
    spread: how trials are shared out over ranks.
    """

    tracks: dict[str, KindCurves] = field(default_factory=dict)
    seed: int = 0
    spread: Spread = alone

    @classmethod
    def restored(cls, records: Iterable[Record], seed: int = 0) -> LambdaSearch:
        """From the `LambdaChoice.record` of every finished site, in order; JSON round trips are fine."""
        search = cls(seed=seed)
        for record in records:
            if record:
                search.remember(record["kind"], dict(record["curve"]))
        return search

    def copy(self) -> LambdaSearch:
        """The same curves, to which others can be added."""
        return LambdaSearch(
            {kind: KindCurves(track.seen, list(track.curves)) for kind, track in self.tracks.items()}, self.seed
        )

    def remember(self, kind: str, curve: Curve) -> None:
        """Count a site of `kind`, and its curve if it has one."""
        track = self.tracks.setdefault(kind, KindCurves())
        track.seen += 1
        track.curves += [curve] if curve else []

    def choose(
        self,
        kind: str,
        rows: Tensor,
        in_features: int,
        method: MethodConfig,
        validation: Callable[[], HeldOutValidation] | None,
    ) -> LambdaChoice:
        """Lambda for each expert of the next site of `kind`.

        Args:
            kind: Sites of one kind share their curves.
            rows: Calibration rows of each expert, int64 [E].
            in_features: K.
            method: A number in `method.reg_lambda` is taken as it is.
            validation: Makes that of this site, where it is measured; None where the text is one fold and nothing is
                held out.
        """
        prior = prior_lambda(rows, in_features, method)
        if method.reg_lambda == PRIOR:
            return LambdaChoice(prior, False, kind, {}, "prior in inputs per row: given", by_prior=True)
        if method.reg_lambda != AUTO:
            return LambdaChoice(torch.full_like(prior, float(method.reg_lambda)), False, kind, {}, "given")
        track = self.tracks.setdefault(kind, KindCurves())
        curve: Curve = {}
        if validation and track.measures_next:
            curve = validation_curve(track.curves, float(prior.min()), validation())
        self.remember(kind, curve)
        if not track.curves:
            why = "prior in inputs per row: no held-out text"
            return LambdaChoice(prior, False, kind, curve, why, by_prior=True)
        pooled = pool(track.curves, float(prior.min()))
        over = f"over {len(track.curves)} {'site' if len(track.curves) == 1 else 'sites'} of this kind"
        if sum(log(min(known.values())) for known in track.curves) >= 0:
            return LambdaChoice(prior, True, kind, curve, f"no lambda beats RTN on held-out text {over}")
        best = max(at for at, loss in enumerate(pooled) if loss <= min(pooled) + TOLERANCE)
        why = f"largest within {TOLERANCE:.0%} of the least held-out loss {over}, the prior counting as one more"
        return LambdaChoice(torch.full_like(prior, GRID[best]), False, kind, curve, why)


def prior_lambda(rows: Tensor, in_features: int, method: MethodConfig) -> Tensor:
    """The prior: c * (K / rows)^0.6 for each expert, fp32 [E], clamped to 0.03 .. 3.

    The exponent is a fit to simulated layers with a known true covariance. c grows from 0.5 to 1.5 with the exponent of
    the saliency: a regulariser that penalises weak inputs less must be stronger to hold the rest as firmly.
    """
    exponent = saliency_exponent(method.saliency)
    constant = 0.5 + 1.0 * min(max((0.5 if exponent is None else exponent) - 0.5, 0.0), 0.5) / 0.5
    return (constant * (in_features / rows.clamp(min=1).float()) ** 0.6).clamp(GRID[1], GRID[-2])


def validation_curve(curves: Sequence[Curve], prior: float, validation: HeldOutValidation) -> Curve:
    """The validation curve of one site, measured around the current optimum.

    The range is extended until the pooled curve has its minimum between two measured points. Empty where no held-out
    row excites the weight.

    Args:
        curves: Of earlier sites of the kind; their number selects the fold to fit on.
        prior: Lambda of the prior.
        validation: Measures this site.
    """
    fit_fold = len(curves)
    losses: dict[float, float] = {}
    first = last = best = _least(pool(curves, prior))
    while True:
        first, last = max(min(first, best - 1), 0), min(max(last, best + 1), len(GRID) - 1)
        wanted = [reg_lambda for reg_lambda in (RTN, *GRID[first : last + 1]) if reg_lambda not in losses]
        losses |= zip(wanted, validation.losses(wanted, fit_fold))
        if losses[RTN] <= 0:
            return {}
        curve = {at: max(loss / losses[RTN], 1e-30) for at, loss in losses.items() if at != RTN}
        best = _least(pool([*curves, curve], prior))
        known = {reg_lambda for each in (*curves, curve) for reg_lambda in each}
        if known.issuperset(GRID[max(best - 1, 0) : best + 2]):
            return dict(sorted(curve.items()))


def pool(curves: Sequence[Curve], prior: float) -> list[float]:
    """Mean log loss at each lambda of the grid, up to a constant, of curves that may cover different parts of it.

    Neighbours on the grid are compared within each curve that has both, and the mean steps are chained. The prior
    counts as one more curve, a shallow parabola around `prior`. Logarithms give easy and hard sites the same weight.
    """
    logs = [{GRID.index(at): log(loss) for at, loss in curve.items()} for curve in curves]
    centre = 2 * log10(prior / GRID[0])
    chain = [0.0]
    for at in range(len(GRID) - 1):
        steps = [known[at + 1] - known[at] for known in logs if {at, at + 1} <= known.keys()]
        steps.append(PRIOR_BEND * ((at + 1 - centre) ** 2 - (at - centre) ** 2))
        chain.append(chain[-1] + sum(steps) / len(steps))
    return chain


def _least(pooled: Sequence[float]) -> int:
    return min(range(len(pooled)), key=pooled.__getitem__)


ROWS = 96
"""Rows of a matrix in the sample."""
EXPERTS = 8
"""Experts of a site in the sample, evenly spaced in the order of their rows."""
TRIAL_BYTES = 1 << 24
"""Bytes of Grams that are quantized in one call, which works in ten times as much."""

QuantizeRows = Callable[[Tensor, Gram, Tensor], Tensor]
"""quantize_rows(rows fp32 [E, R, K], Gram of E, lambdas fp32 [E]) -> dequantized rows fp32 [E, R, K]."""
RtnRows = Callable[[Tensor], Tensor]
"""rtn_rows(rows fp32 [E, R, K]) -> rows quantized by RTN, dequantized to fp32 [E, R, K]."""


class HeldOutValidation:
    """A sample of rows of one site's weight, and the Grams to fit and to validate them. Trials are `spread`."""

    def __init__(
        self,
        weight: Tensor,
        statistics: Statistics,
        shrinkage: float,
        seed: int,
        quantize_rows: QuantizeRows,
        rtn_rows: RtnRows,
        spread: Spread = alone,
    ) -> None:
        ranked = statistics.rows().argsort(descending=True, stable=True)
        experts: slice | Tensor = slice(None)  # of all, Grams are taken as they are and not copied
        if len(ranked) > EXPERTS:
            experts = ranked[:: -(-len(ranked) // EXPERTS)].sort().values
        rows = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed))[:ROWS].sort().values
        self.weight = weight[experts][:, rows.to(weight.device)].float()
        self.statistics = statistics
        self.shrinkage = shrinkage
        self.experts = experts
        self.quantize_rows = quantize_rows
        self.rtn_rows = rtn_rows
        self.spread = spread

    def losses(self, lambdas: Sequence[float], fit_fold: int) -> list[float]:
        """tr(E G E^T), E = W - Q, for each lambda, summed over experts and over every held-out fold G.

        Q is fitted on fold number `fit_fold` (modulo the number of folds), except for that of `RTN`, which is fitted on
        none. G is a sum over rows: an expert counts by its use.
        """
        experts, _, width = self.weight.shape
        at_once = experts * max(1, TRIAL_BYTES // (4 * experts * width * width))

        def work(tasks: Sequence[int]) -> Tensor:
            values = []
            for rounded, same in groupby(tasks, lambda task: lambdas[task // experts] == RTN):
                run, fitted = list(same), None if rounded else self._fitted(fit_fold)
                parts = [run[start : start + at_once] for start in range(0, len(run), at_once)]
                values += [self._side_by_side(part, lambdas, fitted, fit_fold) for part in parts]
            return torch.cat(values)

        by_task = self.spread(len(lambdas) * experts, work)
        losses: list[float] = by_task.view(len(lambdas), experts).sum(-1).tolist()
        return losses

    def rtn_loss(self, fit_fold: int) -> float:
        """The same for RTN alone."""
        return self.losses([RTN], fit_fold)[0]

    def _fitted(self, fit_fold: int) -> Gram:
        """Of the sample's experts."""
        fold = fit_fold % len(self.statistics.folds)
        others = self.statistics.rest[fold] if self.statistics.rest else None
        return shrink_gram(self.statistics.folds[fold], self.shrinkage, others, self.experts)

    def _side_by_side(
        self, tasks: Sequence[int], lambdas: Sequence[float], fitted: Gram | None, fit_fold: int
    ) -> Tensor:
        """Losses of tasks, each one expert at one lambda, number lambda * experts + expert; RTN's without `fitted`."""
        experts = [task % len(self.weight) for task in tasks]
        weight, device = self.weight[experts], self.weight.device
        if fitted is None:
            return self._energy(weight - self.rtn_rows(weight), experts, fit_fold)
        each = torch.tensor([lambdas[task // len(self.weight)] for task in tasks], device=device)
        grams = fitted.part(torch.tensor(experts, device=device))
        return self._energy(weight - self.quantize_rows(weight, grams, each), experts, fit_fold)

    def _energy(self, error: Tensor, experts: Sequence[int], fit_fold: int) -> Tensor:
        """tr(E G E^T) of error [T, R, K] of these experts on all folds except `fit_fold`, float64 [T]."""
        folds = self.statistics.folds
        held_out = [fold for number, fold in enumerate(folds) if number != fit_fold % len(folds)]
        if len(folds[0].rows) > 1:
            chosen = torch.arange(len(folds[0].rows), device=error.device)[self.experts][list(experts)]
            held_out = [fold.part(chosen) for fold in held_out]
        return torch.stack([fold.energy(error) for fold in held_out]).sum(0)

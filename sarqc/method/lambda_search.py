"""Which lambda: one whose codes, fitted on one half of the text, do well on the other half.

With few rows the Gram's small eigenvalues are mostly sampling error, and the solver spends its freedom exactly there;
how strong the pull back to the original weights has to be can be measured, because Grams of two stretches of text are
kept apart. Of the strengths that do about equally well the strongest is taken: the two halves are of one text, and the
text a model will meet is not.

One site's answer is noisy. Sites of one kind (all q/k/v, all down, ...) want about the same lambda, so answers are
pooled over depth; blocks are solved in turn, so the pool is what the blocks so far have said, and to save time not
every block is asked. `benchmarks/quality/STRENGTH.md` has the measurements behind the constants.

`HeldOutValidation` measures a setting of a solver on text that it did not see: it solves on one fold of the Gram and measures on
the others. Rows of a weight are independent, so a random few of them suffice; trials of several strengths stand side
by side on the expert axis and cost one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log, log10
from typing import Any

import torch
from torch import Tensor

from sarqc.config import AUTO, MethodConfig
from sarqc.kinds import saliency_exponent
from sarqc.method.gram import Gram, Statistics, shrunk, together

GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""LambdaSearch to choose from. The loss is flat around its least: half a decade is fine enough."""
MEASURED_FIRST, MEASURED_EVERY = 4, 3
"""The first so many sites of a kind are asked, and then each so many-th."""
TOLERANCE = 0.03
"""Of the strengths whose pooled log loss is within this of the least, the strongest is taken. On text of the same kind
that costs nothing that could be measured; on text of another kind, of which the folds know nothing, it can pay."""
PRIOR_BEND = 0.03
"""Log loss that the rule expects one step of the grid (half a decade) away from its own strength."""

Curve = Mapping[float, float]
"""lambda -> loss on held-out text, relative to that of RTN on a min-max grid."""
Record = Mapping[str, Any]


@dataclass(frozen=True)
class LambdaChoice:
    """reg_lambda: lambda of each expert, fp32 [E]. rounded: whether held-out text prefers RTN to any lambda.
    kind, curve: what this site was asked as one of and what it answered, empty where it was not. why: in words.
    by_prior: whether strength is the rule's, which differs with an expert's rows, for want of any answer."""

    reg_lambda: Tensor
    rounded: bool
    kind: str
    curve: Curve
    why: str
    by_prior: bool = False

    def of_others(self, rows: Tensor, in_features: int, method: MethodConfig) -> LambdaChoice:
        """The choice for other experts of the same layer, which saw so many rows (int64 [E]): the same lambda, or the
        same rule. They are not asked."""
        prior = prior_lambda(rows, in_features, method)
        reg_lambda = prior if self.by_prior else torch.full_like(prior, float(self.reg_lambda[0]))
        return replace(self, reg_lambda=reg_lambda)

    def record(self) -> Record:
        """All but the strength, as JSON values: what `LambdaSearch.restored` reads."""
        return {"kind": self.kind, "why": self.why, "curve": [list(point) for point in self.curve.items()]}


@dataclass
class KindCurves:
    """Sites of one kind so far. seen: how many. curves: the answers of those that were asked."""

    seen: int = 0
    curves: list[Curve] = field(default_factory=list)

    @property
    def measures_next(self) -> bool:
        """Whether the next site is asked."""
        return self.seen < MEASURED_FIRST or self.seen % MEASURED_EVERY == 0


@dataclass
class LambdaSearch:
    """What the sites of a run have answered so far, by kind; `choose` reads it and adds to it.

    Beside the seed of the rows that trials method, it holds nothing but the sites' curves, so what an interrupted run
    knew can be read from the reports it left.
    """

    tracks: dict[str, KindCurves] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def restored(cls, records: Iterable[Record], seed: int = 0) -> LambdaSearch:
        """From the `LambdaChoice.record` of every site that is done, in their order, also after a trip through JSON."""
        lambdas = cls(seed=seed)
        for record in records:
            if record:
                lambdas.remember(record["kind"], dict(record["curve"]))
        return lambdas

    def copy(self) -> LambdaSearch:
        """The same answers, to which others can be added."""
        return LambdaSearch(
            {kind: KindCurves(track.seen, list(track.curves)) for kind, track in self.tracks.items()}, self.seed
        )

    def remember(self, kind: str, curve: Curve) -> None:
        """Count a site of `kind`, and its answer if it gave one."""
        track = self.tracks.setdefault(kind, KindCurves())
        track.seen += 1
        track.curves += [curve] if curve else []

    def choose(
        self, kind: str, rows: Tensor, in_features: int, method: MethodConfig, validation: HeldOutValidation | None
    ) -> LambdaChoice:
        """lambda for each expert of the next site of `kind`.

        rows: calibration rows of each expert, int64 [E]. validation: of this site; None where all text is in one fold, so
        that there is nothing to judge on. A number in `method.reg_lambda` is taken as it is.
        """
        if method.reg_lambda != AUTO:
            return LambdaChoice(
                torch.full(rows.shape, float(method.reg_lambda), device=rows.device), False, kind, {}, "given"
            )
        prior = prior_lambda(rows, in_features, method)
        track = self.tracks.setdefault(kind, KindCurves())
        curve = (
            validation_curve(track.curves, float(prior.min()), validation) if validation and track.measures_next else {}
        )
        self.remember(kind, curve)
        if not track.curves:
            why = "rule in inputs per row: no second stretch of text to judge on"
            return LambdaChoice(prior, False, kind, curve, why, by_prior=True)
        pooled = pool(track.curves, float(prior.min()))
        over = f"over {len(track.curves)} {'site' if len(track.curves) == 1 else 'sites'} of this kind"
        if sum(log(min(known.values())) for known in track.curves) >= 0:
            return LambdaChoice(prior, True, kind, curve, f"no strength beats RTN on held-out text {over}")
        best = max(at for at, loss in enumerate(pooled) if loss <= min(pooled) + TOLERANCE)
        why = f"strongest within {TOLERANCE:.0%} of the least held-out loss {over}, the rule counting as one more"
        return LambdaChoice(torch.full_like(prior, GRID[best]), False, kind, curve, why)


def prior_lambda(rows: Tensor, in_features: int, method: MethodConfig) -> Tensor:
    """c * (K / rows)^0.6 for each expert, fp32 [E], between 0.03 and 3.

    The exponent is a fit to simulated layers whose true covariance is known. c grows from 0.5 to 1.5 with the
    saliency's exponent: a regulariser that spares the weak inputs must be stronger to hold the rest as firmly.
    """
    exponent = saliency_exponent(method.saliency)
    constant = 0.5 + 1.0 * min(max((0.5 if exponent is None else exponent) - 0.5, 0.0), 0.5) / 0.5
    return (constant * (in_features / rows.clamp(min=1).float()) ** 0.6).clamp(GRID[1], GRID[-2])


def validation_curve(curves: Sequence[Curve], prior: float, validation: HeldOutValidation) -> Curve:
    """A site's curve: around the best so far, and on until the pool with it has its least between two known points.

    curves: of earlier sites of the kind; who is next fits on the next fold in turn. prior: lambda by the rule. Empty
    where no held-out row excites the weight.
    """
    fit_fold = len(curves)
    rtn_rows = validation.rtn_loss(fit_fold)
    if rtn_rows <= 0:
        return {}
    curve: dict[float, float] = {}
    first = last = best = _least(pool(curves, prior))
    while True:
        first, last = max(min(first, best - 1), 0), min(max(last, best + 1), len(GRID) - 1)
        wanted = [reg_lambda for reg_lambda in GRID[first : last + 1] if reg_lambda not in curve]
        curve |= {at: max(loss / rtn_rows, 1e-30) for at, loss in zip(wanted, validation.losses(wanted, fit_fold))}
        best = _least(pool([*curves, curve], prior))
        known = {reg_lambda for each in (*curves, curve) for reg_lambda in each}
        if known.issuperset(GRID[max(best - 1, 0) : best + 2]):
            return dict(sorted(curve.items()))


def pool(curves: Sequence[Curve], prior: float) -> list[float]:
    """Mean log loss at each strength of the grid, up to a constant, of curves that may know other stretches of it.

    Neighbours on the grid are compared within each curve that knows both, and the mean steps are chained. The rule
    counts as one more curve, a shallow parabola around `prior`. Logarithms let easy and hard sites count alike.
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
"""Rows of a matrix that a trial solves."""
EXPERTS = 8
"""Experts of a site that a trial solves, evenly spaced in the order of their rows."""
TRIAL_BYTES = 1 << 26
"""Grams of trials that are solved in one call."""

QuantizeRows = Callable[[Tensor, Gram, Tensor], Tensor]
"""trial(rows fp32 [E, R, K], Gram of E, strengths fp32 [E]) -> the quantized rows, dequantized to fp32 [E, R, K]."""
RtnRows = Callable[[Tensor], Tensor]
"""rounding(rows fp32 [E, R, K]) -> the RTN rows, dequantized to fp32 [E, R, K]."""


class HeldOutValidation:
    """Rows of one site's weight, drawn with `seed`, and what is needed to solve and to judge them."""

    def __init__(
        self,
        weight: Tensor,
        statistics: Statistics,
        shrinkage: float,
        seed: int,
        quantize_rows: QuantizeRows,
        rtn_rows: RtnRows,
    ) -> None:
        ranked = statistics.rows().argsort(descending=True, stable=True)
        experts: slice | Tensor = slice(None)  # of all, Grams are taken as they are and not copied
        if len(ranked) > EXPERTS:
            experts = ranked[:: -(-len(ranked) // EXPERTS)].sort().values
        rows = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed))[:ROWS].sort().values
        self.weight = weight[experts][:, rows.to(weight.device)]
        rest = statistics.rest or [None] * len(statistics.folds)
        self.fitted = [shrunk(f, shrinkage, others, experts) for f, others in zip(statistics.folds, rest)]
        self.held_out = [fold.part(experts) for fold in statistics.folds]
        self.quantize_rows = quantize_rows
        self.rtn_rows = rtn_rows

    def losses(self, lambdas: Sequence[float], fit_fold: int) -> list[float]:
        """tr(E G E^T), E = W - Q, for each strength, summed over experts and over every fold G but the one that Q was
        fitted on, which is number `fit_fold` in a cycle. G is a sum over rows: experts weigh as much as they are used."""
        experts, _, width = self.weight.shape
        at_once = max(1, TRIAL_BYTES // (4 * experts * width * width))
        return [
            loss
            for start in range(0, len(lambdas), at_once)
            for loss in self._side_by_side(lambdas[start : start + at_once], fit_fold % len(self.fitted))
        ]

    def rtn_loss(self, fit_fold: int) -> float:
        """The same for RTN, in which no fold has a say."""
        return float(self._energy(self.weight - self.rtn_rows(self.weight), fit_fold % len(self.fitted)).sum())

    def _side_by_side(self, lambdas: Sequence[float], fit_fold: int) -> list[float]:
        count, experts = len(lambdas), len(self.weight)
        each = torch.tensor(lambdas, device=self.weight.device).repeat_interleave(experts)
        weight = self.weight.repeat(count, 1, 1)
        error = weight - self.quantize_rows(weight, self.fitted[fit_fold].repeat(count), each)
        losses: list[float] = self._energy(error.view(count, experts, *error.shape[1:]), fit_fold).sum(-1).tolist()
        return losses

    def _energy(self, error: Tensor, fit_fold: int) -> Tensor:
        """tr(E G E^T) of error [..., E, R, K] on all folds but number `fit_fold`, float64 [..., E]."""
        gram = together(fold for number, fold in enumerate(self.held_out) if number != fit_fold)
        hessian = gram.second_moment() * gram.rows[:, None, None]
        return ((error @ hessian) * error).sum((-2, -1), dtype=torch.float64)

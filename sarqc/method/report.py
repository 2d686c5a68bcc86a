"""What is told of a site that was solved, also where its experts were solved apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sarqc.method.strength import Record


@dataclass(frozen=True)
class SolveReport:
    """What happened at one site.

    rows: calibration rows of each expert. error: tr(E H E^T) / tr(T H T^T) over all experts, E = T - Q, H without the
    regulariser (H = I where there is no Gram), on at most 256 rows of each matrix, evenly spaced. T is what is aimed
    at: the weight W, but for `carried`. rounding_error: the same for plain rounding of T on a min-max grid. signal: the
    denominator of both.
    strength, damping: largest over experts. fallback: why some experts were rounded plainly, or None.
    exponent: of the channel scales, the mean over experts; unscaled: why there are none though they were asked for.
    borrowed_rows: kappa, rows that each expert has from the layer's pool. carried: the share a, by which T makes up for
    what the stream behind it lacks because of all that was quantized before (`method.carry`); 0 where T = W.
    held_out: how the strength was chosen, as `Choice.record` has it. bits: of its codes.
    """

    site: str
    rows: tuple[int, ...]
    error: float
    rounding_error: float
    strength: float
    damping: float
    fallback: str | None
    seconds: float
    exponent: float = 0.0
    unscaled: str | None = None
    borrowed_rows: int = 0
    carried: float = 0.0
    held_out: Record = field(default_factory=dict)
    signal: float = 1.0
    bits: int = 0


def joined(parts: Sequence[SolveReport]) -> SolveReport:
    """One report of a site from those of its experts, solved apart and in their order; the only part itself.

    Errors are ratios of sums, so each counts by its signal; seconds are added up.
    """
    first, *others = parts
    if not others:
        return first
    signal = sum(part.signal for part in parts)
    experts = sum(len(part.rows) for part in parts)
    reasons = dict.fromkeys(part.fallback for part in parts if part.fallback)
    return replace(
        first,
        rows=tuple(row for part in parts for row in part.rows),
        error=sum(part.error * part.signal for part in parts) / signal,
        rounding_error=sum(part.rounding_error * part.signal for part in parts) / signal,
        strength=max(part.strength for part in parts),
        damping=max(part.damping for part in parts),
        fallback="; ".join(reasons) or None,
        seconds=sum(part.seconds for part in parts),
        exponent=sum(part.exponent * len(part.rows) for part in parts) / max(experts, 1),
        signal=signal,
    )

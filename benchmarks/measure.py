"""Times one operation: every point in order of importance, every contender in turns, as long as there is time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import records
from benchmarks.budget import Budget
from benchmarks.ops.base import Contender, Inputs, Op, Point, Roof
from benchmarks.timing import COLD_BYTES, Turn, copies_for, in_turns, ready


@dataclass(frozen=True)
class Settings:
    """quick: small shapes, few turns. seconds: of the clock for each contender at a point."""

    device: torch.device
    quick: bool
    seconds: float

    @property
    def cold_bytes(self) -> float:
        """Bytes that the copies of a point's inputs make together; a quick run is not about speed."""
        return 0 if self.quick else COLD_BYTES


def measure(op: Op, settings: Settings, roof: Roof, budget: Budget, sink: records.Sink) -> None:
    """All points of `op`. What does not fit the budget is recorded as left out."""
    points = sorted(op.points(settings.quick), key=lambda point: point.rank)
    for number, point in enumerate(points):
        if not budget.has_time():
            for later in points[number:]:
                sink.add(records.untimed("left out", op, later, None, "no time was left"))
            print(f"[{budget}] {op.name}: left out {', '.join(p.name for p in points[number:])}", flush=True)
            return
        with budget.step():
            line = measure_point(op, point, settings, roof, sink)
            if settings.device.type == "cuda":
                torch.cuda.empty_cache()  # graphs have pools of their own, which the next point cannot use
        print(f"[{budget}] {op.name} {point.name}: {line}", flush=True)


def measure_point(op: Op, point: Point, settings: Settings, roof: Roof, sink: records.Sink) -> str:
    """Every contender at one point; returns what to show of it."""
    generator = torch.Generator(settings.device).manual_seed(0)
    copies = copies_for(point.traffic, settings.cold_bytes)
    turns: dict[str, Turn] = {}
    errors: dict[str, float | None] = {}
    reason = None
    try:
        inputs = [op.inputs(point, settings.device, generator) for _ in range(copies)]
    except RuntimeError as error:  # a card with less memory
        reason = f"its inputs cannot be made: {_first_line(error)}"
    for contender in op.contenders:
        if reason is not None or (why := contender.unsupported(point, settings.device)):
            sink.add(records.untimed("failed" if reason else "absent", op, point, contender, reason or str(why)))
            continue
        try:
            turn, error_found = _prepared(op, contender, inputs, settings.device)
        except Exception as error:  # noqa: BLE001 (a rival is foreign code: whatever it raises is a finding, and is kept)
            sink.add(records.untimed("failed", op, point, contender, f"{type(error).__name__}: {_first_line(error)}"))
            continue
        if turn is None:
            sink.add(records.untimed("wrong", op, point, contender, f"{op.meaning}: {error_found} > {op.most_error}"))
            continue
        turns[contender.name], errors[contender.name] = turn, error_found
    in_turns(turns, settings.seconds)
    for contender in op.contenders:
        if contender.name in turns:
            turn, error_found = turns[contender.name], errors[contender.name]
            sink.add(records.timed(op, point, contender, turn, roof, error_found, copies))
    return _shown(turns, roof.seconds(point)) if turns else reason or "nothing could be timed"


def _prepared(
    op: Op, contender: Contender, inputs: list[Inputs], device: torch.device
) -> tuple[Turn | None, float | None]:
    """A turn of a contender whose first result was right (None where it was not), and its error."""
    calls = [contender.bind(each) for each in inputs]
    error = None
    if contender.part == "whole":
        error = op.error(inputs[0], calls[0]())
        if not error <= op.most_error:  # NaN is not
            return None, error
    return ready(calls, device), error


def _shown(turns: dict[str, Turn], least: float) -> str:
    def cell(name: str, turn: Turn) -> str:
        middle = records.percentiles(turn.samples)["p50"]
        return f"{name} {_seconds(middle)} ({least / middle:.0%})"

    return "  ".join(cell(name, turn) for name, turn in turns.items())


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def _first_line(error: Any) -> str:
    return next(iter(str(error).splitlines()), "no message")[:200]

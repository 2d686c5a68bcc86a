"""One JSON line for every point and contender, with all that its number depends on; and how such lines are read back.

status "timed": seconds of one call (p20, p50, p80), share of the measured roof, error. "absent": the contender cannot
run, with the reason. "wrong": its result is off by more than the op allows, so it was not timed. "failed": it raised.
"refused": the op's tests fail. "left out": there was no time. "run": a whole quantization, seconds by where they went.
Every line but "timed" and "run" has a `reason`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.ops.base import Contender, Op, Point, Roof
from benchmarks.timing import Turn, percentiles

STATUSES = ("timed", "run", "absent", "wrong", "failed", "refused", "left out")
COMMON = ("status", "op", "device", "gpu", "driver", "clocks", "versions", "commit", "when", "tested", "quick")
TIMED = ("point", "why", "sizes", "contender", "ours", "part", "seconds", "rounds", "calls", "copies", "how", "flops",
         "traffic", "roof", "roof_seconds", "bound", "share", "error", "error_means")  # fmt: skip


RUN = ("model", "windows", "seqlen", "blocks", "layers", "seconds", "total_seconds", "whole_model_seconds")


def timed(op: Op, point: Point, contender: Contender, turn: Turn, roof: Roof, error: float | None, copies: int
          ) -> dict[str, Any]:  # fmt: skip
    """What was measured of one contender at one point; machine facts are added by `Sink`."""
    seconds, least = percentiles(turn.samples), roof.seconds(point)
    return {
        "status": "timed",
        **_who(op, point, contender),
        "seconds": seconds,
        "rounds": len(turn.samples),
        "calls": turn.calls,
        "copies": copies,
        "how": turn.how,
        "flops": point.flops,
        "traffic": point.traffic,
        "roof": {"bandwidth": roof.bandwidth, "flops": roof.flops},
        "roof_seconds": least,
        "bound": roof.bound(point),
        "share": least / seconds["p50"],
        "goal_share": point.goal,
        "goal_seconds": point.goal_seconds,
        "error": error,
        "error_means": op.meaning,
    }


def untimed(status: str, op: Op, point: Point | None, contender: Contender | None, reason: str) -> dict[str, Any]:
    """Why there is no number."""
    return {"status": status, **_who(op, point, contender), "reason": reason}


def _who(op: Op, point: Point | None, contender: Contender | None) -> dict[str, Any]:
    identity: dict[str, Any] = {"op": op.name}
    if point is not None:
        identity |= {"point": point.name, "why": point.why, "sizes": dict(point.sizes), "rank": point.rank}
    if contender is not None:
        identity |= {"contender": contender.name, "ours": contender.ours, "part": contender.part}
    return identity


class Sink:
    """Appends records to a file, each with the facts of the machine and at once: a run that dies keeps what it has."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, record: dict[str, Any]) -> None:
        """One line."""
        whole = {**record, **self.facts}
        check(whole)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole, allow_nan=False) + "\n")


def check(record: dict[str, Any]) -> None:
    """ValueError naming what a record lacks or has wrong."""
    if record.get("status") not in STATUSES:
        raise ValueError(f"status = {record.get('status')!r} is not one of {', '.join(STATUSES)}")
    wanted = (*COMMON, *{"timed": TIMED, "run": RUN}.get(record["status"], ("reason",)))
    if missing := [name for name in wanted if name not in record]:
        raise ValueError(f"a {record['status']!r} record of {record.get('op')!r} has no {', '.join(missing)}")
    if record["status"] == "timed" and not 0 < record["seconds"]["p20"] <= record["seconds"]["p80"]:
        raise ValueError(f"{record['op']} {record['point']}: seconds {record['seconds']} are not in order")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file; of several for one op, point and contender the last. SystemExit for other files."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            check(record)
        except (ValueError, AttributeError) as error:
            raise SystemExit(f"{path}:{number} is no record of benchmarks.run: {error}") from None
        latest[record["op"], record.get("point"), record.get("contender")] = record
    return list(latest.values())


def of_status(records: Iterable[dict[str, Any]], status: str) -> list[dict[str, Any]]:
    """Those with one status."""
    return [record for record in records if record["status"] == status]

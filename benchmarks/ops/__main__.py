"""`python -m benchmarks.ops`: what is predicted for the main shapes on an H200, as the table of NOTES.md."""

from __future__ import annotations

from benchmarks.ops import OPS
from benchmarks.ops.base import H200, Point


def table() -> str:
    """Markdown: the roof of every point of the first ranks, from counted bytes and flops, and what is aimed at."""
    lines = ["| op | shape | why | GFLOP | MB | roof | bound | goal |", "|---|---|---|---:|---:|---:|---|---:|"]
    for op in OPS.values():
        for point in sorted(op.points(False), key=lambda point: point.rank):
            if point.rank <= 1:
                lines.append(f"| {op.name} | {point.name} | {point.why} | {_row(point)} |")
    return "\n".join(lines)


def _row(point: Point) -> str:
    least = H200.seconds(point)
    goal = point.goal_seconds or (least / point.goal if point.goal else None)
    numbers = f"{point.flops / 1e9:.4g} | {point.traffic / 1e6:.4g} | {_time(least)} | {H200.bound(point)}"
    return f"{numbers} | {_time(goal) if goal else '-'}"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


if __name__ == "__main__":
    print(table())

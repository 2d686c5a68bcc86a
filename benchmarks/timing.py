"""How long a call takes: CUDA graphs over cold buffers on a card, the wall clock on a CPU; rivals in turns.

A call is timed over several copies of its inputs, one after another, so that none finds its own in the L2 cache. On a
card the sequence is captured once in a CUDA graph and replayed between two events: no launch overhead of Python is in
the number. What cannot be captured (a rival that waits for the device) is launched from Python, and the record says so.
In each round every contender gets one turn; a card that slows down slows all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from benchmarks.ops.base import Call

COLD_BYTES = 200_000_000  # over three times the L2 cache of an H200
LEAST_CALLS = 20  # in a graph, unless it lasts long
LONG = 0.02  # seconds of one turn that need no more calls
MOST_COPIES = 64
LEAST_ROUNDS, MOST_ROUNDS = 3, 40


def copies_for(traffic: float, cold_bytes: float = COLD_BYTES) -> int:
    """Copies of a call's inputs that together are larger than the caches."""
    return min(MOST_COPIES, max(1, math.ceil(cold_bytes / max(1.0, traffic))))


@dataclass
class Turn:
    """A contender ready for its turns. how: "graph", "stream" or "wall clock". calls: of one turn. run: one turn, in
    seconds."""

    run: Callable[[], float]
    calls: int
    how: str
    samples: list[float] = field(default_factory=list)

    def take(self) -> None:
        """One turn; keeps the seconds of one call."""
        self.samples.append(self.run() / self.calls)


def ready(calls: Sequence[Call], device: torch.device) -> Turn:
    """A turn of all `calls`, repeated until they are `LEAST_CALLS` or last `LONG`; everything has run once before."""
    if device.type != "cuda":
        for call in calls:
            call()
        return Turn(lambda: _wall(calls), len(calls), "wall clock")
    _on_stream(calls)
    once = _on_stream(calls)
    repeats = max(1, min(math.ceil(LEAST_CALLS / len(calls)), math.ceil(LONG / max(once, 1e-9))))
    sequence = [*calls] * repeats
    try:
        _without_waiting(calls)
        graph = _captured(sequence)
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = str(error).splitlines()[0][:80]
        return Turn(lambda: _on_stream(sequence), len(sequence), f"stream ({reason})")
    return Turn(lambda: _between_events(graph.replay), len(sequence), "graph")


def in_turns(turns: Mapping[str, Turn], seconds: float) -> None:
    """Rounds of one turn each until every contender had `seconds` of the clock, three turns at least."""
    spent = dict.fromkeys(turns, 0.0)
    for round_number in range(MOST_ROUNDS):
        waiting = [name for name in turns if round_number < LEAST_ROUNDS or spent[name] < seconds]
        for name in waiting:
            began = time.perf_counter()
            turns[name].take()
            spent[name] += time.perf_counter() - began
        if not waiting:
            return


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 of a few samples, by linear interpolation."""
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    values = torch.quantile(torch.tensor(samples, dtype=torch.float64), quantiles)
    return dict(zip(("p20", "p50", "p80"), values.tolist()))


def _wall(calls: Sequence[Call]) -> float:
    began = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - began


def _on_stream(calls: Sequence[Call]) -> float:
    return _between_events(lambda: [call() for call in calls])


def _between_events(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def _without_waiting(calls: Sequence[Call]) -> None:
    """Raises RuntimeError where a call waits for the device, which no graph can hold.

    Seen before a capture, not by one that fails: torch before 2.12 then takes it to be under way for ever, and neither
    gives memory back nor begins another (pytorch/pytorch#180395).
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            for call in calls:
                call()
    except RuntimeError:  # a wait that torch did not see: end for its allocator what it left under way
        with suppress(RuntimeError, AttributeError):  # it is no public name
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
    graph.replay()  # the first one uploads it
    torch.cuda.synchronize()
    return graph

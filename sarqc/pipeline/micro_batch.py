"""One micro-batch of a stream, and the way it goes through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sarqc.contexts import Closing
from sarqc.errors import ModelError, SarqcError, first_line, out_of_memory
from sarqc.pipeline.offload import Offload
from sarqc.pipeline.points import Arrival, Point
from sarqc.pipeline.task import Task

FAULTS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model's own code raises on a configuration that it was not written for."""


@contextmanager
def model_errors(place: str) -> Iterator[None]:
    """Raise an error of the model's own code as `ModelError` with the place, and a lack of memory as torch does."""
    try:
        yield
    except (SarqcError, torch.OutOfMemoryError):
        raise
    except FAULTS as error:
        if out_of_memory(error):
            raise torch.OutOfMemoryError(first_line(error)) from error
        reason = first_line(error)
        narrow = "BFloat16" in reason or "Half" in reason  # as torch calls them
        mixed = "; some code runs in fp32 alone: try --dtype float32" if narrow else ""
        raise ModelError(f"the model does not run as config.json says, {place}: {reason}{mixed}") from error


@dataclass
class StopOrder:
    """Points in the order of the forward. blocks: how many there are. skipped: those that text does not pass through.
    inside: points in the block at work.

    kept: sites among them whose inputs are needed later. corrections: by point, what is added to the stream there: the
    inputs kept at a site times a matrix [N, K], transposed. The site's outputs have joined the stream by then, so this
    changes them after the fact.
    """

    blocks: int
    skipped: frozenset[int] = frozenset()
    inside: list[Point] = field(default_factory=list)
    kept: set[Point] = field(default_factory=set)
    corrections: dict[Point, tuple[Point, Tensor]] = field(default_factory=dict)

    def wanted(self, point: object) -> bool:
        """Whether micro-batches suspend there."""
        return isinstance(point, Point) and (point.kind in ("enter", "leave") or point in self.inside)

    def after(self, point: Point) -> Point:
        """The point that follows."""
        if point.kind == "leave":
            last = point.block + 1 == self.blocks
            return Point("end" if last else "enter", point.block + 1)
        inside = [one for one in self.inside if one.block == point.block]
        way = [Point("enter", point.block), *inside, Point("leave", point.block)]
        return way[way.index(point) + 1]


class MicroBatch(Closing):
    """A context: the forward is ended when it ends. arrival: where the micro-batch waits; None before it has begun.
    kept: what it brought to sites whose inputs are needed later, in this block. residual: the stream as it has left the
    block before; None in the first one."""

    def __init__(
        self, call: Callable[[], object], number: int, order: StopOrder, first: Point, offload: Offload | None = None
    ) -> None:
        self.number = number
        self.arrival: Arrival | None = None
        self.kept: dict[Point, Tensor] = {}
        self.residual: Tensor | None = None
        self._ahead: Arrival | None = None  # where the forward is, behind skipped blocks
        self._left_version = 0
        self._order = order
        self._first = first
        self._offload = offload
        self._corrected = False
        self._task = Task(call, number, order.wanted, offload)

    def run_to(self, target: Point) -> Arrival:
        """Run to a point, through those before it; returns the activations there."""
        while self.arrival is None or self.arrival.point != target:
            self._step()
        return self.arrival

    def is_at(self, point: Point) -> bool:
        """Whether the micro-batch is there."""
        return self.arrival is not None and self.arrival.point == point

    def correct(self) -> None:
        """Make the correction of the stream that belongs to the point where the micro-batch waits, once."""
        assert self.arrival is not None
        if self._corrected or self.arrival.point not in self._order.corrections:
            return
        site, change = self._order.corrections[self.arrival.point]
        stream = self.arrival.x
        stream.add_(torch.nn.functional.linear(self.kept[site], change).view_as(stream))
        self._corrected = True

    def restore(self) -> None:
        """Bring back what was offloaded."""
        if self._offload is not None:
            self._offload.restore()

    def suspend(self, alive: int, budget: int) -> int:
        """Offload what the micro-batch holds where it goes over the budget. alive: bytes of the micro-batches before it
        that stay; returned with its own."""
        if self._offload is None:
            return alive
        if self._task.ended:  # what it returned is the caller's
            self._offload.discard()
            return alive
        size = sum(storage.nbytes() for storage in self._offload.alive().values())
        if alive + size <= budget:
            return alive + size
        self._offload.offload()
        return alive

    @property
    def residual_intact(self) -> bool:
        """Whether what has left the block before is still what it was: the model may have written into it."""
        return self.residual is not None and self.residual._version == self._left_version

    def close(self) -> None:
        """End the forward."""
        try:
            self._task.close()
        finally:
            self.arrival = self._ahead = self.residual = None
            self.kept.clear()
            if self._offload is not None:
                self._offload.discard()

    def _step(self) -> None:
        expected = self._first
        if self.arrival is not None:
            expected = self._order.after(self.arrival.point)
            self.correct()
            if self.arrival.point in self._order.kept:
                self.kept[self.arrival.point] = self.arrival.x
            elif self.arrival.point.kind == "leave":
                self.kept.clear()
                self._leave(self.arrival.tensor)
        before, self.arrival, self._corrected = self.arrival, None, False
        arrival = self._ahead or self._resume(expected)
        if not isinstance(arrival, Arrival):
            arrival = Arrival(Point("end", self._order.blocks), output=arrival)
        self._ahead = arrival if expected.block in self._order.skipped else None
        if self._ahead is not None:
            arrival = Arrival(expected, self._task.replayed if before is None else before.tensor, skipped=True)
        if arrival.point != expected:
            raise ModelError(
                f"micro-batch {self.number} reaches {arrival.point} where {expected} comes first in others: what the "
                "model computes depends on its tokens; leave that layer with an ignore pattern"
            )
        self.arrival = arrival
        if self._task.replayed is not None:
            self._leave(self._task.replayed)
            self._task.replayed = None

    def _leave(self, stream: Tensor | None) -> None:
        self.residual = stream
        self._left_version = 0 if stream is None else stream._version

    def _resume(self, towards: Point) -> object:
        with model_errors(f"before {towards}"):
            return self._task.resume()

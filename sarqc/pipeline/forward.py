"""All micro-batches of a stream in the model's own forward, point after point.

A forward is asked for a point and hands out what each micro-batch brings there, one after the other; all of them wait
there until a further point is asked for. Points of a block are asked for in the order in which the model reaches them,
each as often as needed. What happens in between (a layer's weight is replaced, a block is loaded) holds for what
follows.

Where suspended micro-batches take too much memory, what they hold is offloaded (`pipeline.offload`); or the block is
*recomputed*: they wait at its entry, and for every point inside it each runs from there and is dropped. The results are
the same to the bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sarqc.contexts import Closing
from sarqc.pipeline.activation_store import Store
from sarqc.pipeline.micro_batch import MicroBatch, StopOrder, model_errors
from sarqc.pipeline.offload import Offload
from sarqc.pipeline.points import Arrival, Point, first_tensor


def drain(arrivals: Iterable[object]) -> None:
    """Go through all of them."""
    deque(arrivals, maxlen=0)


@dataclass(frozen=True)
class Memory:
    """How suspended micro-batches are held. budget: bytes of each stream that stay where they are. store: takes the
    rest; None to keep all. recompute: whether they wait at a block's entry alone."""

    budget: int = 0
    store: Store | None = None
    recompute: bool = False


IN_PLACE = Memory()


class Forward(Closing):
    """The micro-batches of one stream. A context: their forwards are ended when it ends, wherever they are.

    calls: each runs the model's own forward on one micro-batch. blocks: the decoder blocks; `Hooks` have to be on them.
    first: the first block that is entered. skipped: those that text does not pass through.
    """

    def __init__(
        self,
        calls: Sequence[Callable[[], object]],
        blocks: Sequence[nn.Module],
        *,
        first: int = 0,
        skipped: frozenset[int] = frozenset(),
        memory: Memory = IN_PLACE,
    ) -> None:
        self._blocks = list(blocks)
        self._order = StopOrder(len(blocks), skipped)
        self._recompute = memory.recompute
        self._budget = memory.budget
        store, owners = memory.store, dict[int, Offload]()
        self._batches = [
            MicroBatch(call, number, self._order, Point("enter", first), Offload(store, owners) if store else None)
            for number, call in enumerate(calls)
        ]

    def begin_block(self, inside: Sequence[Point] = (), kept: Sequence[Point] = ()) -> None:
        """Say which points the block has that all micro-batches wait to enter, in the order it reaches them.

        kept: sites among them whose inputs are kept until the block is left, for a correction.
        """
        self._order.inside, self._order.kept = list(inside), set(kept)
        self._order.corrections.clear()

    def enter(self, block: int) -> None:
        """Run every micro-batch to the entry of a block."""
        drain(self.at(Point("enter", block)))

    def at(self, point: Point) -> Iterator[Arrival]:
        """Run every micro-batch to a point and yield its activations there; another call yields them once more.

        Raises `ModelError` naming the module where a micro-batch takes another path than the others, or where the
        model's own code fails; `torch.OutOfMemoryError` where memory runs out.
        """
        for arrival, _ in self.with_kept(point, None):
            yield arrival

    def with_kept(self, point: Point, site: Point | None) -> Iterator[tuple[Arrival, Tensor | None]]:
        """As `at`, with the inputs of a site that `begin_block` listed in `kept`, of the same micro-batch."""
        inside = point.kind not in ("enter", "end")
        for batch in self._resident():
            if self._recompute and inside and not batch.is_at(point):
                batch.run_to(Point("enter", point.block))
                with self._from_entry(batch) as again:
                    arrival = again.run_to(point)
                    yield arrival, None if site is None else again.kept[site]
            else:
                arrival = batch.run_to(point)
                yield arrival, None if site is None else batch.kept[site]

    def look(self, block: int) -> Iterator[Iterator[Arrival]]:
        """For every micro-batch at a block's entry, its activations at each point of the block, in order. The run of
        the block is dropped."""
        for batch in self._resident():
            batch.run_to(Point("enter", block))
            with self._from_entry(batch) as again:
                yield (again.run_to(point) for point in self._order.inside)

    def leave(self, block: int) -> Iterator[Arrival]:
        """Run every micro-batch to the end of a block, with all corrections added to the residual."""
        for batch in self._resident():
            arrival = batch.run_to(Point("leave", block))
            batch.correct()
            yield arrival

    def correct(self, at: Point, site: Point, change: Tensor) -> None:
        """Add x @ change^T to the residual at a point that all micro-batches have reached; x is the input of the site,
        change [N, K]."""
        self._order.corrections[at] = site, change

    def residual_intact(self) -> bool:
        """Whether the residual after the previous block is kept, so that `pop_residuals` can yield it."""
        return all(batch.residual_intact for batch in self._batches)

    def residuals(self) -> list[Tensor]:
        """The residual of every micro-batch after the previous block; empty before the first one."""
        return [batch.residual for batch in self._batches if batch.residual is not None]

    def pop_residuals(self) -> Iterator[Tensor]:
        """End all forwards one by one, and yield the residual after the previous block."""
        while self._batches:
            batch = self._batches.pop(0)
            batch.restore()
            residual = batch.residual
            batch.close()
            assert residual is not None
            yield residual

    def close(self) -> None:
        """End all forwards."""
        while self._batches:
            self._batches.pop().close()

    def _resident(self) -> Iterator[MicroBatch]:
        """Every micro-batch, with its tensors in memory while it is in use."""
        held = 0
        for batch in self._batches:
            batch.restore()
            yield batch
            held = batch.suspend(held, self._budget)

    def _from_entry(self, batch: MicroBatch) -> MicroBatch:
        """The same micro-batch through the block that it waits to enter."""
        entry = batch.arrival
        assert entry is not None
        call = BlockCall(self._blocks[entry.point.block], entry)
        return MicroBatch(call.run, batch.number, self._order, entry.point)


class BlockCall:
    """A block with the arguments of one micro-batch that waits to enter it; it can be run as often as wanted."""

    def __init__(self, block: nn.Module, entry: Arrival) -> None:
        self._block = block
        self._entry = entry

    @property
    def hidden(self) -> Tensor:
        """What enters the block."""
        return self._entry.x

    def run(self) -> Any:
        """What the block returns for a copy of its input, in case the block writes into it."""
        hidden = self._entry.x
        if self._entry.skipped:
            return hidden
        args, kwargs = list(self._entry.args), dict(self._entry.kwargs)
        at = next((at for at, value in enumerate(args) if value is hidden), None)
        if at is not None:
            args[at] = hidden.clone()
        else:
            name = next(name for name, value in kwargs.items() if value is hidden)
            kwargs[name] = hidden.clone()
        with model_errors(f"in block {self._entry.point.block}"):
            return self._block(*args, **kwargs)

    def __call__(self) -> Tensor:
        """What leaves the block: the first tensor of what it returns."""
        hidden = first_tensor(self.run())
        return self._entry.x if hidden is None else hidden

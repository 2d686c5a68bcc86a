"""The streams of a run: a text through the quantized model, through the reference, and a few tokens as a probe.

All are suspended in the model's own forward and go from block to block together. The quantized stream has the weights
of the result in all blocks behind it; the reference, where errors are corrected, has the original ones. The probe is
the first tokens of the first window, on the quantized side: what has to be found out about a block is tried on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise

import torch
from torch import Tensor

from sarqc.checkpoint.state import ChunkedTensor
from sarqc.contexts import Closing
from sarqc.errors import NumericError
from sarqc.method.gram import non_finite_rows
from sarqc.model.lazy_model import LazyModel
from sarqc.model.source import TensorSource
from sarqc.model.tokenizer import check_tokens
from sarqc.pipeline.comm import Comm
from sarqc.pipeline.forward import IN_PLACE, BlockCall, Forward, Memory, drain
from sarqc.pipeline.points import Arrival, Hooks, Point
from sarqc.pipeline.stored_states import fingerprint, output_form, replaying
from sarqc.pipeline.work_split import Batches, partition_batches, positions, renumbered

TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 8192}
"""Tokens of a micro-batch: few enough for a CPU's caches in fp32 (in 16 bits twice as many), enough to fill a GPU."""
PROBE_TOKENS = 8
"""Tokens of the probe."""


def windows_at_once(device: torch.device, length: int, dtype: torch.dtype | None = None) -> int:
    """Default micro-batch size for sequences of `length` tokens."""
    short = device.type == "cpu" and dtype is not None and dtype.itemsize == 2
    return max(1, (2 if short else 1) * TOKENS_AT_ONCE[device.type] // length)


def cut(count: int, micro_batch: int, folds: int) -> Batches:
    """Micro-batches of `count` windows, none of them across two folds; folds are stretches of nearly equal length."""
    edges = [fold * count // folds for fold in range(folds + 1)]
    return [
        (slice(start, min(start + micro_batch, stop)), fold)
        for fold, (begin, stop) in enumerate(pairwise(edges))
        for start in range(begin, stop, micro_batch)
    ]


@dataclass(frozen=True)
class Text:
    """This rank's part of the calibration text. tokens: int64 [S, L], its windows. batches: windows of each
    micro-batch, and its fold. places: which windows of the whole text each rank has. rank: whose part this is. probe:
    int64 [1, n], the same on all ranks."""

    tokens: Tensor
    batches: Batches
    folds: int
    places: Sequence[Tensor]
    rank: int
    probe: Tensor

    @classmethod
    def of(cls, tokens: Tensor, batches: Batches, folds: int, comm: Comm) -> Text:
        """A rank's part of all windows; `ArgumentError` where there are too few micro-batches for all ranks."""
        dealt = partition_batches(batches, folds, comm.size)
        places = [positions(part) for part in dealt]
        probe = tokens[:1, :PROBE_TOKENS]
        if comm.size > 1:
            batches, tokens = renumbered(dealt[comm.rank]), tokens[places[comm.rank]]
        return cls(tokens, batches, folds, places, comm.rank, probe)

    @property
    def micro_batch(self) -> int:
        """Windows in the largest micro-batch."""
        return max(int(windows.stop - windows.start) for windows, _ in self.batches)

    def halved(self) -> Text:
        """The same with every micro-batch of more than one window cut in two."""
        parts = []
        for windows, fold in self.batches:
            middle = (windows.start + windows.stop + 1) // 2
            parts += [(part, fold) for part in (slice(windows.start, middle), slice(middle, windows.stop))]
        return replace(self, batches=[(part, fold) for part, fold in parts if part.stop > part.start])

    def grouped(self, windows: Iterator[Tensor]) -> Iterator[Tensor]:
        """The windows [L, ...] of all micro-batches in order, those of each micro-batch in one tensor of its own."""
        for part, _ in self.batches:
            yield torch.stack(list(islice(windows, part.stop - part.start)))

    def own(self, hidden: ChunkedTensor) -> Iterator[Tensor]:
        """This rank's windows [L, H] of those of all ranks."""
        mine = set(self.places[self.rank].tolist())
        return (window for number, window in enumerate(hidden.rows()) if number in mine)


@dataclass(frozen=True)
class StoredStates:
    """What is stored of a stream between two blocks, so that a run can go on there.

    hidden: [S, L, H] of all windows of the text, as they leave a block; from all ranks to rank 0, every rank has to go
    through them. form: how that block returns them. fingerprint: of what the next block is entered with beside them.
    probe: the probe's, on the host. reference: whether there is a reference stream.
    """

    hidden: ChunkedTensor
    form: str
    fingerprint: str
    probe: Tensor
    reference: bool


class Streams(Closing):
    """A context. quantized, probe: streams; reference: one, or None. hooks: on the units that text passes.

    rounded: puts the weights of the result in the place of embeddings that are loaded; whether it has some.
    """

    def __init__(
        self,
        lazy: LazyModel,
        source: TensorSource,
        device: torch.device,
        dtype: torch.dtype | None,
        memory: Memory,
        rounded: Callable[[], bool] = lambda: False,
    ) -> None:
        self.lazy = lazy
        self.units = lazy.units[: lazy.passed]
        self.hooks = Hooks(self.units)
        self.quantized = self.probe = Forward([], self.units)
        self.reference: Forward | None = None
        self.form: str | None = None  # how the last block returned the stream
        self._entered: tuple[str, str] | None = None  # form and fingerprint with which the last block was entered
        self._source = source
        self._device = device
        self._dtype = dtype
        self._memory = memory
        self._rounded = rounded

    def begin(self, text: Text, *, reference: bool, stored: StoredStates | None = None, block: int = 0) -> bool:
        """Bring all streams to a block: to the first one, or with `stored` the quantized stream and the probe to
        `block`; whether that could be done. False: what is stored is not all that the block needs.

        Raises `NumericError` where the embeddings are not finite, `ArgumentError` for tokens that are not the model's.
        """
        self.close()
        self.hooks = Hooks(self.units)
        self.text = text
        check_tokens(text.tokens, self.lazy.model)
        rounded = self._load_outer()
        self.quantized, self.probe = self._forward(text, block), self._probe(text, block)
        if stored is None:
            self._refuse_lost(self.quantized.at(Point("enter", 0)))
            self.probe.enter(0)
        else:
            own = text.own(stored.hidden)
            self._hand(self.quantized, block, stored.form, text.grouped(own))
            drain(own)  # all ranks go through all windows
            self._hand(self.probe, block, stored.form, iter([stored.probe]))
            if fingerprint(self.entry(block)) != stored.fingerprint:
                return False
            self.form = stored.form
        if reference:
            self._load_originals(rounded)
            self.reference = self._forward(text)
            self.reference.enter(0)
        self.lazy.unload_embeddings()
        return True

    def again(self, text: Text, block: int) -> bool:
        """Bring all streams to a block behind the first anew, with other micro-batches of the same windows, from what
        has left the block before; whether that could be done."""
        if self._entered is None or not all(forward.residual_intact() for forward in self._all()):
            return False
        self.form, entered = self._entered
        quantized, probe, reference = self.quantized, self.probe, self.reference
        self.text = text
        rounded = self._load_outer()
        self.quantized = self._forward(text, block)
        self._hand(self.quantized, block, self.form, text.grouped(_windows(quantized.pop_residuals())))
        self.probe = self._probe(text, block)
        self._hand(self.probe, block, self.form, probe.pop_residuals())
        if reference is not None:
            self._load_originals(rounded)
            self.reference = self._forward(text, block)
            self._hand(self.reference, block, self.form, text.grouped(_windows(reference.pop_residuals())))
        self.lazy.unload_embeddings()
        return fingerprint(self.entry(block)) == entered

    def entry(self, block: int) -> Arrival:
        """The probe at a block's entry."""
        (entry,) = self.probe.at(Point("enter", block))
        return entry

    def call(self, block: int) -> BlockCall:
        """A block as the probe enters it."""
        return BlockCall(self.units[block], self.entry(block))

    def enter(self, block: int) -> None:
        """Bring all streams to a block."""
        for forward in self._all():
            forward.enter(block)
        # for `again`, before which the probe and the form can be past the entry
        self._entered = None if self.form is None else (self.form, fingerprint(self.entry(block)))

    def leave_quantized(self, block: int) -> int:
        """Bring the quantized stream to the end of a block; how many rows of it hold NaN or Inf."""
        lost = 0
        for arrival in self.quantized.leave(block):
            inside = block < len(self.lazy.blocks)  # behind the blocks a model is not entered
            self.form = output_form(arrival) if inside and arrival.x.dim() == 3 else None
            lost += non_finite_rows(arrival.x)
        return lost

    def leave_probe(self, block: int) -> None:
        """Bring the probe to the end of a block."""
        drain(self.probe.leave(block))

    def leave_reference(self, block: int) -> None:
        """Bring the reference, if there is one, to the end of a block, which has its original weights."""
        if self.reference is not None:
            drain(self.reference.leave(block))

    def drop_reference(self) -> None:
        """Go on without one."""
        if self.reference is not None:
            self.reference.close()
        self.reference = None

    def stored_states(self, block: int, comm: Comm) -> StoredStates | None:
        """What is to be stored where a block is left and another one follows; None where that would not be enough."""
        if self.form is None:
            return None
        (left,) = self.probe.leave(block)
        probe = left.x.cpu().clone()
        shape = (sum(map(len, self.text.places)), *self.text.tokens.shape[1:], probe.shape[-1])
        rows = partial(comm.gather_rows, places=self.text.places)
        hidden = ChunkedTensor(shape, probe.dtype, lambda: rows(self._windows(block)))
        return StoredStates(hidden, self.form, fingerprint(self.entry(block + 1)), probe, self.reference is not None)

    def close(self) -> None:
        """End all streams, and take the hooks off."""
        for forward in self._all():
            forward.close()
        self.reference, self.form = None, None
        self.hooks.close()

    def _load_outer(self) -> bool:
        """What stands outside the blocks, as the result has it; whether some of it is not the original."""
        self.lazy.load_outer(self._source, self._device, self._dtype)
        return self._rounded()

    def _load_originals(self, rounded: bool) -> None:
        """The same for the reference."""
        if rounded:
            self.lazy.load_outer(self._source, self._device, self._dtype)

    def _windows(self, block: int) -> Iterator[Tensor]:
        for arrival in self.quantized.leave(block):
            yield from arrival.x.cpu().split(1)

    def _forward(self, text: Text, first: int = 0) -> Forward:
        return self._make([text.tokens[windows] for windows, _ in text.batches], first, self._memory)

    def _probe(self, text: Text, first: int = 0) -> Forward:
        return self._make([text.probe], first, IN_PLACE)

    def _make(self, batches: Sequence[Tensor], first: int, memory: Memory) -> Forward:
        calls: list[Callable[[], object]] = [partial(self._run, tokens) for tokens in batches]
        return Forward(calls, self.units, first=first, skipped=self.lazy.skipped, memory=memory)

    def _run(self, tokens: Tensor) -> object:
        # without the head, unless something behind the blocks is asked for
        model = self.lazy.model if len(self.units) > len(self.lazy.blocks) else self.lazy.model.base_model
        return model(input_ids=tokens.to(self._device), use_cache=False)

    def _hand(self, forward: Forward, block: int, form: str, hidden: Iterator[Tensor]) -> None:
        """Bring a stream to a block, with what each micro-batch has brought out of the one before."""
        with replaying(self.lazy.layers, block, form, lambda _: next(hidden).to(self._device)):
            forward.enter(block)

    def _all(self) -> Iterator[Forward]:
        return (forward for forward in (self.quantized, self.probe, self.reference) if forward is not None)

    def _refuse_lost(self, entering: Iterator[Arrival]) -> None:
        if sum(non_finite_rows(arrival.x) for arrival in entering):
            raise NumericError("the embeddings of the calibration tokens hold NaN or Inf: repair the checkpoint")


def _windows(micro_batches: Iterator[Tensor]) -> Iterator[Tensor]:
    for tensor in micro_batches:
        yield from tensor

"""Quantize block by block, in the model's own forward. A generator: it yields, and writes and prints nothing.

Only one block's weights are in memory at a time; all micro-batches wait where they enter it. They go on from site to
site, and at each the layers that read one tensor are quantized from exactly the inputs that they will have when the
model is served: everything before is quantized already.

A Linear behind the blocks that is to be quantized too (`LazyModel.included`) is a unit of one site, treated as a block
is. Micro-batches that wait at the last such unit go no further: the logits behind a head are never made. Embeddings
that are quantized too are the last units (`pipeline.embeddings`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sarqc.config import MethodConfig, QuantConfig
from sarqc.errors import ArgumentError, ModelError, NumericError, ResourceError, first_line, out_of_memory
from sarqc.method.gram import MAX_LOST
from sarqc.method.lambda_search import LambdaSearch
from sarqc.method.layer import LayerReport
from sarqc.model.layers import Targets, check_group_size, targets
from sarqc.model.lazy_model import LazyModel
from sarqc.model.source import PrefetchingSource, TensorSource
from sarqc.pipeline.block import Block, Portions, check_weights
from sarqc.pipeline.comm import Comm, synchronize_oom
from sarqc.pipeline.embeddings import round_embeddings
from sarqc.pipeline.execution import Execution
from sarqc.pipeline.journal import Journal
from sarqc.pipeline.quantize_site import SiteQuantizer, Weights
from sarqc.pipeline.streams import StoredStates, Streams, Text, cut
from sarqc.system import range_advice

_MORE_MEMORY = "use a device with more memory or --device cpu"


@dataclass(frozen=True)
class BlockResult:
    """weights: by the checkpoint's names, without ".weight"; E = 1, on the CPU. reports: one for each site. seconds: of
    each stage (load, reference, scale, forward, solve). changed: tensors that are not quantized and took up channel
    scales (norms, routers, biases), on the CPU; they replace the checkpoint's own, by its names, in its dtypes. notes:
    what did not go as planned, in words. stored_states: what a run that goes on behind this block needs beside the
    weights, if anything. They are valid until the next block is requested."""

    index: int
    weights: Weights
    reports: list[LayerReport]
    seconds: dict[str, float]
    changed: dict[str, Tensor]
    notes: list[str]
    stored_states: StoredStates | None


def _nothing_stored(index: int) -> tuple[Weights, dict[str, Tensor]]:
    raise ResourceError(f"block {index} was not stored, so the run cannot begin behind it")


@dataclass(frozen=True)
class Start:
    """Where a continued run begins: at `block`, which is entered with `stored_states`.

    Without one (and for the reference) the text is run through the blocks before once more, with the weights and the
    changed tensors that `stored(index)` hands back: forward passes, no solving, and the same bits. lambda_search: the
    validation curves of the blocks before.
    """

    block: int = 0
    stored_states: StoredStates | None = None
    stored: Callable[[int], tuple[Weights, dict[str, Tensor]]] = _nothing_stored
    lambda_search: LambdaSearch = field(default_factory=LambdaSearch)


def run(
    lazy: LazyModel,
    source: TensorSource,
    tokens: Tensor | None,
    quant: QuantConfig,
    method: MethodConfig,
    execution: Execution | None = None,
    start: Start | None = None,
) -> Generator[BlockResult, None, None]:
    """Quantize every block of a model in order, then what is included outside of them.

    Scales get the dtype the checkpoint stores the weight in; bf16 where that is neither bf16 nor fp16, because it
    keeps fp32's range. Where the device runs out of memory, the micro-batch or the Grams at a time are halved for the
    rest of the run, and the result notes it. Rows of activations that are not finite are left out and noted.

    Args:
        lazy: The model, without weights.
        source: Its weights.
        tokens: int64 [S, L] sequences to calibrate on; None for methods without calibration, which run no forward.
        quant: The number format.
        method: The method.
        execution: Where and in which pieces.
        start: Where a resumed run begins.

    Yields:
        A result for each block. Close the generator where it is not used to its end.

    Raises:
        NumericError: Weights, or more than 1 % of the rows of activations, are not finite; names the layer.
        ResourceError: Memory runs out with one sequence and one Gram at a time.
    """
    selected = targets(lazy, quant)
    check_group_size(selected, quant)
    lazy.included = selected.included
    execution, start = execution or Execution(), start or Start()
    prefetched = PrefetchingSource(source) if execution.prefetch else None
    source = prefetched or source
    solving = SiteQuantizer(
        lazy, source, quant, method, execution.place, start.lambda_search, execution.comm, execution.bit_widths
    )
    journal = Journal(execution.on_progress, execution.place)
    driver = _Driver(solving, selected, execution.dtype, journal, Portions(execution.gram_budget), prefetched)
    with prefetched or nullcontext():
        if not method.calibrated:
            yield from driver.without_text(start.block)
            return
        text = _text(tokens, method, execution)
        rounded = partial(round_embeddings, solving, selected.selected)
        with Streams(lazy, source, execution.place, execution.dtype, execution.memory, rounded) as streams:
            yield from driver.with_text(streams, text, start)
        yield from driver.without_text(max(start.block, lazy.passed))  # the embeddings


def _text(tokens: Tensor | None, method: MethodConfig, execution: Execution) -> Text:
    """This rank's sequences, cut into micro-batches."""
    comm = execution.comm
    folds = execution.folds or (min(2, len(tokens)) if tokens is not None and method.needs_validation else 1)
    if tokens is None or tokens.dim() != 2 or not 1 <= folds <= len(tokens):
        shape = None if tokens is None else list(tokens.shape)
        raise ArgumentError(f"tokens = {shape} with folds = {folds}: give [sequences, length], a sequence per fold")
    micro_batch = execution.sequences_at_once(tokens.shape[1])
    if comm.size > 1 and not comm.ordered:  # where order counts they stay what they are in one process
        micro_batch = min(micro_batch, max(1, len(tokens) // folds // comm.size))
    return Text.of(tokens, cut(len(tokens), micro_batch, folds), folds, comm)


@dataclass
class _Driver:
    """The loop over blocks."""

    solving: SiteQuantizer
    selected: Targets
    dtype: torch.dtype | None
    journal: Journal
    portions: Portions
    prefetched: PrefetchingSource | None

    @property
    def lazy(self) -> LazyModel:
        return self.solving.lazy

    @property
    def comm(self) -> Comm:
        return self.solving.comm

    def without_text(self, first: int) -> Generator[BlockResult, None, None]:
        """Every unit from `first` on, by a method that looks at weights alone."""
        for index in range(first, len(self.lazy.units)):
            self.journal.begin_block()
            self._load(index)
            block = self._new_block(index)
            try:
                block.quantize_alone()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise ResourceError(f"{self._place(index)} ({first_line(error)}): {_MORE_MEMORY}") from error
            self.lazy.unload_block(index)
            yield self._result(block, None)

    def with_text(self, streams: Streams, text: Text, start: Start) -> Generator[BlockResult, None, None]:
        """Every unit that text passes, from the start on, as the streams pass it."""
        if start.block >= self.lazy.passed:
            return
        self._go_to(streams, text, start)
        for index in range(start.block, self.lazy.passed):
            self.journal.begin_block()
            self._enter(index, streams)
            block = self._with_memory(index, streams)
            self.lazy.unload_block(index)
            last = index + 1 == self.lazy.passed
            yield self._result(block, None if last else streams.stored_states(index, self.comm))

    def _go_to(self, streams: Streams, text: Text, start: Start) -> None:
        """Bring the streams to the block that the run begins with; those before have their stored weights.

        Where the quantized stream is run through them too, the reference goes along: it shows which layers correct it.
        """
        corrects, stored = self.solving.method.error_correction, start.stored_states
        needed = corrects and start.block < len(self.lazy.blocks)
        handed = stored is not None and streams.begin(
            text, reference=needed and stored.reference, stored=stored, block=start.block
        )
        if not handed:
            streams.begin(text, reference=corrects)
        for index in range(start.block if streams.reference is not None or not handed else 0):
            self._load(index)
            if handed:
                streams.leave_reference(index)
            else:
                self._enter(index, streams)
                block = self._new_block(index)
                block.look(streams)
                streams.leave_reference(index)
                block.put_stored(*start.stored(index), streams)
                self._leave(index, block, streams)
            self.lazy.unload_block(index)

    def _enter(self, index: int, streams: Streams) -> None:
        """Bring the streams to a unit."""
        if index == len(self.lazy.blocks):
            streams.drop_reference()  # nothing writes to the residual any more
        streams.enter(index)

    def _with_memory(self, index: int, streams: Streams) -> Block:
        """A block quantized, begun again with less at once for as long as the device runs out of memory."""
        known = self.solving.lambda_search.copy()
        while True:
            self.solving.begin(known)  # what a failed attempt has chosen is chosen, and counted, again
            try:
                return self._attempt(index, streams)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = first_line(error)
            # Only out here are the frames of the attempt gone, and with them the tensors that filled the device.
            self._reduce_memory(index, streams, reason)

    def _attempt(self, index: int, streams: Streams) -> Block:
        self.portions.begin()
        self._load(index)
        block = self._new_block(index)
        block.look(streams)
        if streams.reference is not None:
            with self.journal.stage(index, "reference"):
                synchronize_oom(self.comm, lambda: streams.leave_reference(index))
        block.quantize(streams)
        if len(self.lazy.blocks) <= index == self.lazy.passed - 1:
            return block  # nobody reads the logits
        with self.journal.stage(index, "forward"):
            lost = synchronize_oom(self.comm, lambda: self._leave(index, block, streams))
        self._check_leaving(index, lost, streams)
        return block

    def _reduce_memory(self, index: int, streams: Streams, reason: str) -> None:
        """Halve the micro-batches or the Grams at a time, and run the streams to the block again."""
        self.lazy.unload_block(index)
        if self.solving.device.type == "cuda":
            torch.cuda.empty_cache()
        text, at_once = streams.text, max(self.comm.all_gather_object(streams.text.micro_batch))
        matrices = self.journal.current in ("scale", "solve")  # which the size of a micro-batch hardly changes
        if self.portions.together > 1 and (matrices or at_once == 1):
            what = f"{self.portions.together} Grams at a time halved"
            self.portions.halve()
        elif at_once > 1:
            text, what = text.halved(), f"micro-batch of {at_once} sequences halved"
        else:
            raise ResourceError(
                f"{self._place(index)} ({reason}), with one window and one Gram at a time: {_MORE_MEMORY}"
            )
        self.journal.notes.append(f"{self._place(index)} ({reason}): {what}")
        reference = streams.reference is not None
        again = streams.again(text, index) if index else streams.begin(text, reference=reference)
        if not all(self.comm.all_gather_object(again)):
            raise ResourceError(
                f"{self._place(index)} ({reason}), and what this model passes between blocks is not stored, so the "
                "block cannot begin again: use a smaller --micro-batch or --gram-budget; a rerun resumes there"
            )

    def _place(self, index: int) -> str:
        return f"{self.solving.device} has no memory left at {self.lazy.unit_name(index)}"

    def _new_block(self, index: int) -> Block:
        first = index == self.selected.first_block
        return Block(self.solving, index, self.selected.of_block(index), self.journal, self.portions, first)

    def _leave(self, index: int, block: Block, streams: Streams) -> int:
        """Bring the streams to the end of the block; how many rows of what leaves it are not finite."""
        lost = streams.leave_quantized(index)
        block.put_corrected()
        streams.leave_probe(index)
        return lost

    def _load(self, index: int) -> None:
        """Load a block, and begin to read the one behind it."""
        lazy = self.lazy
        with self.journal.stage(index, "load"):
            lazy.load_block(index, self.solving.source, self.solving.device, self.dtype)
            check_weights(lazy, self.selected.of_block(index))
            if self.prefetched and index + 1 < len(lazy.units):
                self.prefetched.read(lazy.tensors(index + 1))

    def _check_leaving(self, index: int, lost: int, streams: Streams) -> None:
        """`NumericError` where too much of what leaves a block, on all ranks, is not finite; a note where something
        is."""
        lost, rows = map(sum, zip(*self.comm.all_gather_object((lost, streams.text.tokens.numel()))))
        if lost:
            where = f"{lost} of {rows} rows of what leaves {self.lazy.unit_name(index)} hold NaN or Inf"
            if lost > MAX_LOST * rows:
                raise NumericError(f"{where} on the calibration text: {range_advice(self.lazy.dtype)}")
            self.journal.notes.append(where)

    def _result(self, block: Block, stored_states: StoredStates | None) -> BlockResult:
        lost = [target.linear for target in block.members if target.linear not in block.weights]
        if lost:
            raise ModelError(f"{lost[0]} was targeted and came out unquantized ({len(lost)} such layers)")
        ordered = {target.linear: block.weights[target.linear] for target in block.members}
        notes = list(dict.fromkeys(self.journal.notes))
        return BlockResult(
            block.index, ordered, block.reports, dict(self.journal.seconds), block.changed, notes, stored_states
        )

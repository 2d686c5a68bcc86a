"""The work folder: the finished part of a run on disk, from which a killed run resumes.

    lock                 held by the process that works here; its pid is in it
    plan.json            the run's fingerprint, and what a report needs to know
    bit_allocation.json  bits of every layer, where a run chose them (`--avg-bits`)
    blocks/00000.safetensors ...   a finished block: a shard of the checkpoint, with all tensors of the block
    blocks/00000.json ...          its record: reports, seconds, notes, and the sum of every tensor
    hidden.safetensors   the hidden states that enter the next block, or one before it
    checkpoint/          at the end: the folder that becomes the output
    activations-*        for an instant: activations that are at work and have no room in memory

Every file is whole or absent. A shard is on disk before its record, and the record before the hidden states that
follow. So whenever a run ended, the blocks from 0 up to the first without a record are good, and so is the file of
hidden states. If that file is lost, the finished blocks are run forward again. If it is of a block before the last,
the run goes on there, and makes the same shards again.

A finished shard is written once. At the end it is renamed into `checkpoint/`; a run that ends before its output is
whole finds it there, and moves it back.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from sarqc.checkpoint.assemble import shard_number
from sarqc.checkpoint.folders import check_overlap, check_place
from sarqc.checkpoint.formats import NEUTRAL
from sarqc.checkpoint.manifest import Fingerprint, fingerprints
from sarqc.checkpoint.state import (
    PARTIAL,
    ChunkedTensor,
    State,
    SummedShard,
    read_sealed,
    write_sealed,
    write_shard,
    write_state,
)
from sarqc.config import QuantConfig
from sarqc.errors import ArgumentError, CheckpointError
from sarqc.method.lambda_search import LambdaSearch
from sarqc.method.layer import LayerReport
from sarqc.options import from_record
from sarqc.pipeline.activation_store import PREFIX as SCRATCH
from sarqc.pipeline.bit_allocation import BitAllocation
from sarqc.pipeline.driver import BlockResult, Start
from sarqc.pipeline.fingerprint import MAY_CHANGE, first_difference
from sarqc.pipeline.lock import LOCK, locked
from sarqc.pipeline.quantize_site import Weights
from sarqc.pipeline.streams import StoredStates

LAYOUT = 2
"""Of the work folder. 1 held codes, scales and zeros in a form of its own."""
_PLAN, _BITS, _BLOCKS = "plan.json", "bit_allocation.json", "blocks"
_HIDDEN, _BUILT = "hidden.safetensors", "checkpoint"
_OURS = {name + end for name in (LOCK, _PLAN, _BITS, _BLOCKS, _HIDDEN, _BUILT) for end in ("", PARTIAL)}
_OLD = {"widths.json"}  # of layout 1
_AGAIN = "--no-resume begins again, another --work-dir keeps it"

STATES_SHARE = 1 / 20
"""Of the time of a run, what storing hidden states may take; one that is killed repeats 20 times that at most."""
STATES_SHORT = 0.25
"""Seconds in which hidden states are stored behind every block, whatever the share."""


def default_work(out: Path | str) -> Path:
    """The work folder of an output folder: a hidden one beside it, always of the same name."""
    target = Path(out).resolve()
    return target.with_name(f".{target.name}.work")


def work_place(out: str | Path, work: str | Path | None, model: Path) -> Path:
    """The work folder, which must lie outside the model and the output."""
    check_overlap(out, model)
    place = default_work(out) if work is None else Path(work).expanduser()
    check_place(place, "work folder")
    check_overlap(place, model, "work folder")
    inner, outer = place.resolve(), Path(out).resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise ArgumentError(
            f"work_dir = {str(place)!r} and the output folder {out} lie inside each other: use another --work-dir"
        )
    return place


@dataclass(frozen=True)
class BlockRecord:
    """What is known of a finished block beside its tensors.

    wall: seconds since the block before was finished. linears: bits of each quantized Linear. changed: tensors that
    are not quantized and took up channel scales. sums: of every tensor of the shard.
    """

    reports: list[LayerReport]
    seconds: dict[str, float]
    notes: list[str]
    wall: float
    linears: dict[str, int]
    changed: list[str]
    sums: dict[str, Fingerprint]


class WorkFolder:
    """An open work folder; made by `begin`. about: what `begin` was given."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.fingerprint: dict[str, Any] = manifest["fingerprint"]
        self.about: dict[str, Any] = manifest["about"]
        self._stored, self._storing = 0.0, 0.0  # when hidden states were stored last, and how long it took

    @property
    def blocks(self) -> int:
        """Blocks that the model has."""
        return int(self.about["blocks"])

    @cached_property
    def quant(self) -> QuantConfig:
        """The number format of the run."""
        return from_record(QuantConfig, self.fingerprint["quant"])

    @property
    def built(self) -> Path:
        """The place of the folder that becomes the output. Nothing is there when a run begins."""
        return self.folder / _BUILT

    def save_bit_allocation(self, bit_widths: BitAllocation) -> None:
        """Save what `bit_widths` returns from then on, before any block is."""
        write_sealed(self.folder / _BITS, bit_widths.to_json())

    def bit_widths(self) -> BitAllocation | None:
        """The widths that the run has chosen, if it has; `CheckpointError` where blocks follow some that are lost."""
        path = self.folder / _BITS
        if path.exists():
            return BitAllocation.from_json(_read(path))
        if self.quant.avg_bits is not None and self._record_file(0).exists():
            raise CheckpointError(f"{path} is missing, which says what width each block has; {_AGAIN}")
        return None

    def save(self, result: BlockResult, wall: float, tensors: Mapping[str, ChunkedTensor]) -> None:
        """Save a finished block as a shard, then its record, then the hidden states that leave it, if there are any.

        Args:
            result: The block.
            wall: Seconds since the block before was finished.
            tensors: The model's own tensors of the block, by name. Those that `result` replaces are left out.

        Raises:
            ResourceError: The disk is full or fails.
        """
        packed: dict[str, Tensor] = {}
        for linear, weight in result.weights.items():
            packed |= NEUTRAL.pack(linear, weight, self.quant.at(weight.bits))
        replaced = {f"{linear}.weight" for linear in result.weights}
        left = {name: tensor for name, tensor in tensors.items() if name not in replaced}
        bits = {linear: weight.bits for linear, weight in result.weights.items()}
        sums = write_shard(self.shard(result.index), left | packed | result.changed)
        record = BlockRecord(result.reports, result.seconds, result.notes, wall, bits, list(result.changed), sums)
        write_sealed(self._record_file(result.index), asdict(record) | {"block": result.index})
        states = result.stored_states
        if states is not None:
            metadata = {
                "block": result.index + 1,
                "form": states.form,
                "entry": states.fingerprint,
                "reference": states.reference,
            }
            began = time.perf_counter()
            write_state(self.folder / _HIDDEN, {"hidden": states.hidden, "probe": states.probe}, metadata)
            self._stored = time.perf_counter()
            self._storing = self._stored - began

    def states_due(self) -> bool:
        """Whether the block that is saved next is saved with the hidden states that leave it.

        Those of a large model are gigabytes, and a run can go on from any block that it has them of.
        """
        since = time.perf_counter() - self._stored
        return self._storing <= STATES_SHORT or self._storing <= STATES_SHARE * since

    def start(self, passed: int) -> tuple[Start, str | None]:
        """Where to go on, and a word on what was found damaged. passed: how many units need hidden states."""
        finished, trouble = 0, None
        while finished < self.blocks and self._record_file(finished).exists():
            try:
                with self._open(finished) as shard:
                    shard.check()
            except CheckpointError as error:
                trouble = str(error)
                break
            finished += 1
        if finished == 0 or finished >= passed:
            return self._start(finished, None), trouble
        try:
            with State(self.folder / _HIDDEN) as state:
                entering = int(state.record["block"])
                if entering <= finished:
                    state.check()
                    whole, record = state.parts("hidden"), state.record
                    hidden = ChunkedTensor(whole.shape, whole.dtype, self._hidden)
                    states = StoredStates(
                        hidden, record["form"], record["entry"], state.load("probe"), record["reference"]
                    )
                    return self._start(entering, states), trouble
        except CheckpointError as error:
            trouble = trouble or str(error)
        return self._start(finished, None), trouble

    def _hidden(self) -> Iterator[Tensor]:
        """Hidden states piece by piece, from a file that is open for no longer than that."""
        with State(self.folder / _HIDDEN) as state:
            yield from state.parts("hidden").each()

    def _start(self, block: int, states: StoredStates | None) -> Start:
        choices = [report.held_out for index in range(block) for report in self.record(index).reports]
        return Start(block, states, self.stored, LambdaSearch.restored(choices, self.fingerprint["seed"]))

    def stored(self, index: int) -> tuple[Weights, dict[str, Tensor]]:
        """The weights of a finished block (E = 1) and what it changed, as whoever loads the checkpoint will read them;
        `CheckpointError` where they are not what was saved."""
        record = self.record(index)
        config = NEUTRAL.config(self.quant, (), record.linears)
        with self._open(index) as shard:
            weights = {linear: NEUTRAL.unpack(linear, config, shard.load) for linear in record.linears}
            return weights, {name: shard.load(name) for name in record.changed}

    def record(self, index: int) -> BlockRecord:
        """What is known of a finished block."""
        path = self._record_file(index)
        sealed = read_sealed(path)
        if sealed.pop("block", None) != index:
            raise CheckpointError(f"{path} is the record of another block: it was renamed")
        reports = [LayerReport(**report | {"rows": tuple(report["rows"])}) for report in sealed["reports"]]
        return BlockRecord(**sealed | {"reports": reports, "sums": fingerprints(sealed["sums"], path)})

    def shard(self, index: int) -> Path:
        """The file of a finished block's tensors."""
        return self.folder / _BLOCKS / f"{index:05d}.safetensors"

    def remove(self) -> None:
        """Remove the folder; the plan first and the lock last, so that the next run clears what a kill leaves."""
        (self.folder / _PLAN).unlink(missing_ok=True)
        _clear(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)

    def is_empty(self) -> bool:
        """Whether nothing is finished yet: no block, and no choice of widths."""
        return not self._record_file(0).exists() and not (self.folder / _BITS).exists()

    def _record_file(self, index: int) -> Path:
        return self.shard(index).with_suffix(".json")

    def _open(self, index: int) -> SummedShard:
        return SummedShard(self.shard(index), self.record(index).sums)


def recorded(folder: Path, name: str) -> Any:
    """A setting of the run that was begun in a work folder; None where there is none, or none that can be read."""
    try:
        return read_sealed(folder / _PLAN)["fingerprint"][name]
    except (CheckpointError, LookupError, TypeError):
        return None


@contextmanager
def begin(
    folder: Path, fingerprint: Mapping[str, Any], about: Mapping[str, Any], *, restart: bool = False
) -> Iterator[WorkFolder]:
    """The work folder of a run, new or continued, locked for as long as the context lasts.

    It is removed again where an error ends the context before the first block was saved. `ArgumentError` for a folder
    that was begun with other settings, `CheckpointError` for a damaged one, one of an earlier version or one with other
    files in it, `ResourceError` where another process works in it.
    """
    with locked(folder):
        for left in folder.glob(f"{SCRATCH}*"):
            left.unlink()
        if strange := sorted({path.name for path in folder.iterdir()} - _OURS - _OLD):
            raise CheckpointError(f"work folder {folder} holds {strange[0]!r}, which is none of its files: use another")
        manifest = {"layout": LAYOUT, "fingerprint": dict(fingerprint), "about": dict(about)}
        if restart or not (folder / _PLAN).exists():
            _clear(folder)
            (folder / _BLOCKS).mkdir()
            write_sealed(folder / _PLAN, manifest)
        plan = _read(folder / _PLAN)
        if plan.get("layout") != LAYOUT:
            raise CheckpointError(
                f"work folder {folder} was begun by another version of sarqc: finish the run with that one; {_AGAIN}"
            )
        work = WorkFolder(folder, plan)
        if difference := first_difference(work.fingerprint, fingerprint):
            name, old, new = difference
            raise ArgumentError(
                f"work folder {folder} was begun with {name} = {old!r}, now it is {new!r}: run with what it was; "
                f"{_AGAIN}; only {', '.join(MAY_CHANGE)} may change"
            )
        if work.about != about:  # the same run, but the model moved, say
            write_sealed(folder / _PLAN, manifest)
            work = WorkFolder(folder, manifest)
        _take_back(work)
        try:
            yield work
        except BaseException:  # an interruption too; it goes on below
            if work.is_empty():
                work.remove()
            raise


def _take_back(work: WorkFolder) -> None:
    """Undo what a run that ended before its output was whole had moved."""
    if not work.built.exists():
        return
    for path in work.built.iterdir():
        number = shard_number(path)
        if number is not None and number <= work.blocks and not work.shard(number - 1).exists():
            path.rename(work.shard(number - 1))
    shutil.rmtree(work.built)


def _clear(folder: Path) -> None:
    """Remove all but the lock."""
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_sealed(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_AGAIN}") from error

"""The work folder: what a run has done so far, on disk, so that a killed run goes on where it was.

    lock                 held by the process that works here; its pid is in it
    plan.json            the run's fingerprint, and what a report needs to know
    widths.json          the width of every layer, where a run chose them (`--avg-bits`)
    blocks/00000.safetensors ...   codes, scales and zeros of each finished block, with its reports: any format can be
                         made of them
    hidden.safetensors   the hidden states that enter the next block
    states-*             for an instant: hidden states that are at work and have no room in memory

Every file is whole or absent, and each block is on disk before the hidden states that follow it. So whatever was
going on when a run ended, the blocks from 0 up to the first that is missing are good, and so is the file of hidden
states; where that is lost, it is made again by running the finished blocks forward.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sarqc import legacy
from sarqc.checkpoint.files import read_json
from sarqc.checkpoint.state import PARTIAL, ChunkedTensor, State, durable, open_state, write_state
from sarqc.errors import ArgumentError, CheckpointError, ResourceError
from sarqc.method.lambda_search import LambdaSearch
from sarqc.method.layer import LayerReport
from sarqc.method.weight import QuantizedWeight
from sarqc.pipeline.bit_allocation import BitAllocation
from sarqc.pipeline.driver import BlockResult, Start
from sarqc.pipeline.fingerprint import MAY_CHANGE, first_difference
from sarqc.pipeline.offload import PREFIX as SCRATCH
from sarqc.pipeline.quantize_site import Weights
from sarqc_kernels.packing import pack, unpack

_LOCK, _PLAN, _WIDTHS, _BLOCKS, _HIDDEN = "lock", "plan.json", "widths.json", "blocks", "hidden.safetensors"
_OURS = {name + end for name in (_LOCK, _PLAN, _WIDTHS, _BLOCKS, _HIDDEN) for end in ("", PARTIAL)}
_AGAIN = "--no-resume begins again, another --work-dir keeps it"


def default_work(out: Path | str) -> Path:
    """The work folder of an output folder: a hidden one beside it, always of the same name."""
    target = Path(out).resolve()
    return target.with_name(f".{target.name}.work")


@dataclass(frozen=True)
class BlockRecord:
    """What is known of a finished block beside its weights. wall: seconds since the block before was finished."""

    reports: list[LayerReport]
    seconds: dict[str, float]
    notes: list[str]
    wall: float


class Work:
    """An open work folder; made by `begin` or `reopen`. about: what `begin` was given."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.fingerprint = legacy.fingerprint(manifest["fingerprint"])
        self.about: dict[str, Any] = manifest["about"]

    @property
    def blocks(self) -> int:
        """Blocks that the model has."""
        return int(self.about["blocks"])

    def save_bit_allocation(self, bit_widths: BitAllocation) -> None:
        """Save what `bit_widths` returns from then on, before any block is."""
        _write_sealed(self.folder / _WIDTHS, bit_widths.to_json())

    def bit_widths(self) -> BitAllocation | None:
        """The widths that the run has chosen, if it has; `CheckpointError` where blocks follow some that are lost."""
        path = self.folder / _WIDTHS
        if path.exists():
            return BitAllocation.from_json(_read_sealed(path))
        if self.fingerprint["quant"].get("avg_bits") is not None and self._block_file(0).exists():
            raise CheckpointError(f"{path} is missing, which says what width each block has; {_AGAIN}")
        return None

    def save(self, result: BlockResult, wall: float) -> None:
        """Save a finished block, then the hidden states that leave it; `ResourceError` where the disk is full."""
        tensors: dict[str, Tensor] = {}
        for linear, weight in result.weights.items():
            tensors[f"{linear}.codes"] = pack(weight.codes[0], weight.bits)
            tensors[f"{linear}.scales"], tensors[f"{linear}.zeros"] = weight.scales[0], weight.zeros[0]
        tensors |= {f"{name}.changed": tensor for name, tensor in result.changed.items()}
        linears = {linear: [weight.codes.shape[-1], weight.bits] for linear, weight in result.weights.items()}
        record = asdict(BlockRecord(result.reports, result.seconds, result.notes, wall))
        write_state(
            self._block_file(result.index),
            tensors,
            record | {"linears": linears, "changed": list(result.changed), "block": result.index},
        )
        if result.leaving is not None:
            write_state(self.folder / _HIDDEN, {"hidden": result.leaving}, {"block": result.index + 1})

    def start(self, gram: bool) -> tuple[Start, str | None]:
        """Where to go on, and a word on what was found damaged. gram: whether hidden states are needed."""
        finished, trouble = 0, None
        while finished < self.blocks and self._block_file(finished).exists():
            try:
                with self._open(finished) as state:
                    state.check()
            except CheckpointError as error:
                trouble = str(error)
                break
            finished += 1
        if not gram or finished in (0, self.blocks):
            return self._start(finished, None), trouble
        try:
            with open_state(self.folder / _HIDDEN) as state:
                entering = int(state.record["block"])
                if entering <= finished:
                    state.check()
                    whole = state.parts("hidden")
                    return self._start(entering, ChunkedTensor(whole.shape, whole.dtype, self._hidden)), trouble
        except CheckpointError as error:
            trouble = trouble or str(error)
        return self._start(finished, None), trouble

    def _hidden(self) -> Iterator[Tensor]:
        """Hidden states piece by piece, from a file that is open for no longer than that."""
        with open_state(self.folder / _HIDDEN) as state:
            yield from state.parts("hidden").each()

    def _start(self, block: int, hidden: ChunkedTensor | None) -> Start:
        said = [report.held_out for index in range(block) for report in self.record(index).reports]
        return Start(block, hidden, self.stored, LambdaSearch.restored(said, self.fingerprint["seed"]))

    def linears(self, index: int) -> list[str]:
        """Names of the quantized Linears of a finished block."""
        with self._open(index) as state:
            return list(state.record["linears"])

    def changed_names(self, index: int) -> list[str]:
        """Names of the tensors of a finished block that are not quantized and took up scales."""
        with self._open(index) as state:
            return list(state.record["changed"])

    def changed(self, index: int) -> dict[str, Tensor]:
        """Those tensors."""
        with self._open(index) as state:
            return {name: state.load(f"{name}.changed") for name in state.record["changed"]}

    def stored(self, index: int) -> tuple[Weights, dict[str, Tensor]]:
        """The weights of a finished block and what it changed; `CheckpointError` where they are not what was saved."""
        return dict(self.each_weight(index)), self.changed(index)

    def each_weight(self, index: int) -> Iterator[tuple[str, QuantizedWeight]]:
        """The weights of a finished block one by one, E = 1."""
        with self._open(index) as state:
            for linear, (columns, bits) in state.record["linears"].items():
                codes = unpack(state.load(f"{linear}.codes"), bits, columns)
                scales, zeros = state.load(f"{linear}.scales"), state.load(f"{linear}.zeros")
                yield linear, QuantizedWeight(codes[None], scales[None], zeros[None], bits)

    def record(self, index: int) -> BlockRecord:
        """What is known of a finished block."""
        with self._open(index) as state:
            found = state.record
        reports = [LayerReport(**legacy.site(report) | {"rows": tuple(report["rows"])}) for report in found["reports"]]
        return BlockRecord(reports, found["seconds"], found["notes"], found["wall"])

    def check_finished(self) -> None:
        """`CheckpointError` where a block is missing."""
        missing = next((index for index in range(self.blocks) if not self._block_file(index).exists()), None)
        if missing is not None:
            raise CheckpointError(
                f"work folder {self.folder} has {missing} of {self.blocks} blocks: continue the run first"
            )

    def remove(self) -> None:
        """Remove the folder; the plan first, so that what a kill leaves over is no work folder."""
        for path in (
            self.folder / _PLAN,
            self.folder / _WIDTHS,
            *sorted(self.folder.glob(_HIDDEN + "*")),
            self.folder / _BLOCKS,
        ):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def is_empty(self) -> bool:
        """Whether nothing is finished yet: no block, and no choice of widths."""
        return not self._block_file(0).exists() and not (self.folder / _WIDTHS).exists()

    def _block_file(self, index: int) -> Path:
        return self.folder / _BLOCKS / f"{index:05d}.safetensors"

    @contextmanager
    def _open(self, index: int) -> Iterator[State]:
        with open_state(self._block_file(index)) as state:
            if state.record.get("block") != index:
                raise CheckpointError(f"{state.path} holds block {state.record.get('block')}: it was renamed")
            yield state


@contextmanager
def begin(
    folder: Path, fingerprint: Mapping[str, Any], about: Mapping[str, Any], *, restart: bool = False
) -> Iterator[Work]:
    """The work folder of a run, new or continued, locked for as long as the context lasts.

    It is removed again where an error ends the context before the first block was saved. `ArgumentError` for a folder
    that was begun with other settings, `CheckpointError` for a damaged one or one with other files in it,
    `ResourceError` where another process works in it.
    """
    with _locked(folder, make=True):
        for left in folder.glob(f"{SCRATCH}*"):
            left.unlink()
        if strange := sorted({path.name for path in folder.iterdir()} - _OURS):
            raise CheckpointError(f"work folder {folder} holds {strange[0]!r}, which is none of its files: use another")
        manifest = {"fingerprint": dict(fingerprint), "about": dict(about)}
        if restart or not (folder / _PLAN).exists():
            _clear(folder)
            _write_plan(folder, manifest)
        work = Work(folder, _read_plan(folder))
        if difference := first_difference(work.fingerprint, fingerprint):
            name, old, new = difference
            raise ArgumentError(
                f"work folder {folder} was begun with {name} = {old!r}, now it is {new!r}: run with what it was; "
                f"{_AGAIN}; only {', '.join(MAY_CHANGE)} may change"
            )
        if work.about != about:  # the same run, but the model moved, say
            _write_plan(folder, manifest)
            work = Work(folder, manifest)
        try:
            yield work
        except BaseException:
            if work.is_empty():
                work.remove()
            raise


@contextmanager
def reopen(folder: Path) -> Iterator[Work]:
    """The work folder of a finished run, locked for as long as the context lasts; errors as in `begin`."""
    if not (folder / _PLAN).is_file():
        raise CheckpointError(f"{folder} is no work folder: give that of a run")
    with _locked(folder):
        yield Work(folder, _read_plan(folder))


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / _BLOCKS).mkdir()


def _write_plan(folder: Path, manifest: dict[str, Any]) -> None:
    _write_sealed(folder / _PLAN, manifest)


def _read_plan(folder: Path) -> dict[str, Any]:
    return _read_sealed(folder / _PLAN)


def _write_sealed(path: Path, values: dict[str, Any]) -> None:
    """JSON with its own sum, on disk when this returns."""
    with durable(path) as partial, partial.open("w", encoding="utf-8") as file:
        json.dump(values | {"seal": _seal(values)}, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def _read_sealed(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_AGAIN}") from error
    if values.pop("seal", None) != _seal(values):
        raise CheckpointError(f"{path} is damaged: it does not match its sum; {_AGAIN}")
    return values


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@contextmanager
def _locked(folder: Path, make: bool = False) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process whatever becomes of it."""
    path = folder / _LOCK
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists() and any(folder.iterdir()):
                raise CheckpointError(f"work folder {folder} holds other files: use an empty one, or one of a run")
        file = path.open("a+")
    except OSError as error:
        raise ResourceError(f"work folder {folder} cannot be used: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino
        except OSError:
            gone = False
            file.seek(0)
            holder = file.read().strip() or "?"
        else:
            holder = ""
        if gone or holder:
            who = f"is in use by process {holder}" if holder else "was just removed by another process"
            raise ResourceError(f"work folder {folder} {who}: wait for it, or use another --work-dir")
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield

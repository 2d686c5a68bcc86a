"""Several processes at one run, on one machine or many: `torchrun --nproc-per-node N -m sarqc quantize ...`.

torchrun starts the processes and sets their ranks in the environment. torch.distributed sends host tensors by gloo and
GPU tensors by nccl. Only rank 0 has a work folder and writes; the others read the model. Where a rank ends, its
connections break: ranks that wait for it report that, and torchrun ends all. `sarqc.pipeline.watchdog` finds a stuck
rank.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from sarqc.checkpoint.state import ChunkedTensor
from sarqc.errors import ArgumentError, Interrupted, ResourceError, SarqcError, opening_line
from sarqc.pipeline.comm import SINGLE_PROCESS, Comm
from sarqc.pipeline.driver import Start
from sarqc.pipeline.fingerprint import first_difference
from sarqc.pipeline.messages import MESSAGE_BYTES, Message, messages
from sarqc.pipeline.progress import NoProgress, Progress
from sarqc.pipeline.quantize_site import Weights, blank, layout
from sarqc.pipeline.streams import StoredStates
from sarqc.pipeline.watchdog import heartbeats
from sarqc.system import from_torchrun

COLLECTIVE_TIMEOUT = timedelta(days=7)
"""How long a rank waits for a live one, which may write terabytes to a slow disk. A dead rank is noticed at once by its
connections, a stuck one by its heartbeat."""
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others to start."""
SMALL = 1 << 12
"""Bytes of a value that one message gathers from every rank."""

_Value = TypeVar("_Value")


def world() -> int:
    """Ranks of this run, as torchrun says; 1 without it."""
    return from_torchrun("WORLD_SIZE", 1)


def is_leader() -> bool:
    """Whether this process writes and prints: it is rank 0, or alone."""
    return world() == 1 or from_torchrun("RANK", 0) == 0


@contextmanager
def process_group(device: str, *, ordered: bool) -> Iterator[tuple[Comm, str]]:
    """The group that torchrun started this process in, and the device of this process; alone without torchrun.

    device: `auto` and `cuda` become the GPU of this rank. Raises `ArgumentError` where a machine has fewer GPUs than
    ranks, `ResourceError` where the ranks do not find each other.
    """
    if world() == 1:
        yield SINGLE_PROCESS, device
        return
    if device in ("auto", "cuda") and torch.cuda.is_available():
        local = from_torchrun("LOCAL_RANK", 0)
        if local >= torch.cuda.device_count():
            raise ArgumentError(
                f"--nproc-per-node {local + 1} or more on {torch.cuda.device_count()} GPUs: start one process for each"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    gpu = device.startswith("cuda")
    with ExitStack() as stack:
        try:
            store, rank, size = next(rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
            stack.enter_context(heartbeats(store.clone(), rank, size))
            backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise ResourceError(
                f"the ranks do not find each other ({opening_line(error)}): start them with torchrun"
            ) from error
        yield Ranks(ordered, device if gpu else "cpu"), device
        dist.destroy_process_group()  # not after an error: it would wait for the others, and they for this one


class Ranks(Comm):
    """The processes of torch.distributed; see `Comm`."""

    def __init__(self, ordered: bool, device: str) -> None:
        self.rank, self.size, self.ordered = dist.get_rank(), dist.get_world_size(), ordered
        places = {torch.device(place).type: place for place in ("cpu", device)}
        self._buffers = {
            kind: torch.empty(MESSAGE_BYTES, dtype=torch.uint8, device=place) for kind, place in places.items()
        }

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sums on all ranks."""
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            for message in self._messages([tensor for tensor in tensors if tensor.dtype == dtype]):
                message.pack()
                self._talk(partial(dist.all_reduce, message.content.view(dtype)))
                message.unpack()

    def recv_previous(self, tensors: Sequence[Tensor]) -> None:
        """Receive from the rank before."""
        for message in self._messages(tensors) if self.rank > 0 else ():
            self._receive_(message.content, self.rank - 1)
            message.unpack()

    def send_next(self, tensors: Sequence[Tensor]) -> None:
        """Send to the next rank."""
        for message in self._messages(tensors) if self.rank + 1 < self.size else ():
            message.pack()
            self._send(message.content, self.rank + 1)

    def broadcast(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Broadcast."""
        for message in self._messages(tensors):
            if self.rank == owner:
                message.pack()
            self._talk(partial(dist.broadcast, message.content, owner))
            if self.rank != owner:
                message.unpack()

    def all_gather_object(self, value: _Value) -> list[_Value]:
        """Values of all ranks, in one message where they are small, in two where one is not."""
        pickled = pickle.dumps(value)
        length = len(pickled).to_bytes(8, "little")
        gathered = self._all_gather((length + pickled)[:SMALL], SMALL)
        lengths = [int.from_bytes(part[:8], "little") for part in gathered]
        if max(lengths) + 8 > SMALL:
            gathered = self._all_gather(length + pickled, max(lengths) + 8)
        return [pickle.loads(part[8 : 8 + length]) for part, length in zip(gathered, lengths)]

    def _all_gather(self, own: bytes, length: int) -> list[bytes]:
        """`own`, filled up to `length` bytes, of all ranks. It lies on the CPU, so it waits for no GPU."""
        sent = torch.frombuffer(bytearray(own.ljust(length, b"\0")), dtype=torch.uint8)
        gathered = list(torch.empty(self.size, length, dtype=torch.uint8))
        self._talk(partial(dist.all_gather, gathered, sent))
        return [part.numpy().tobytes() for part in gathered]

    def _messages(self, tensors: Sequence[Tensor]) -> Iterator[Message]:
        for device, buffer in self._buffers.items():
            if placed := [tensor for tensor in tensors if tensor.device.type == device]:
                yield from messages(placed, buffer)

    def gather_rows(self, rows: Iterator[Tensor], places: Sequence[Tensor]) -> Iterator[Tensor]:
        """Rows of all ranks on rank 0, one message each."""
        if self.rank > 0:
            for row in rows:
                self._send(row, 0)
            return
        owners = {number: rank for rank, place in enumerate(places) for number in place.tolist()}
        row = torch.empty(0)
        for number in sorted(owners):  # the first is ours, as `partition_batches` has it
            if owners[number] == 0:
                row = next(rows)
                yield row
            else:
                received = torch.empty_like(row)
                self._receive_(received, owners[number])
                yield received

    def _send(self, tensor: Tensor, to: int) -> None:
        self._talk(lambda: dist.send(_raw(tensor), to))

    def _receive_(self, tensor: Tensor, source: int) -> None:
        self._talk(lambda: dist.recv(_raw(tensor), source))

    def _talk(self, speak: Callable[[], object]) -> None:
        try:
            speak()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ResourceError(
                f"another rank ended or cannot be reached ({opening_line(error)}): see its output; "
                "rerun the command to resume from the last block, with any number of ranks"
            ) from error


def _raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, in its memory where that is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8)


@contextmanager
def named(comm: Comm, where: Callable[[], str]) -> Iterator[None]:
    """Errors say which rank they come from and where it was, if there are several."""
    try:
        yield
    except Interrupted:
        raise
    except SarqcError as error:
        if comm.size == 1:
            raise
        raise type(error)(f"rank {comm.rank} of {comm.size}, {where()}: {error}") from error


def check_ranks_agree(comm: Comm, fingerprint: Mapping[str, Any]) -> None:
    """`ArgumentError` where ranks see different models or texts, or run different versions."""
    for rank, other in enumerate(comm.all_gather_object(fingerprint)):
        if difference := first_difference(fingerprint, other):
            name, here, there = difference
            raise ArgumentError(
                f"{name} = {here!r} on rank {comm.rank} and {there!r} on rank {rank}: give all the same"
            )


class Following(NoProgress):
    """Progress of ranks other than 0: shows nothing, and passes on a request to stop."""

    def __init__(self, progress: Progress) -> None:
        self._watcher = progress

    def stop_requested(self) -> bool:
        """Whether this rank received the request."""
        return self._watcher.stop_requested()


def start_everywhere(comm: Comm, start: Start | None) -> Start:
    """Rank 0's start on every rank; the others, which have no work folder, give None."""
    states = start.stored_states if start else None
    described = None if start is None else (start.block, _describe(states), start.lambda_search)
    shared = comm.all_gather_object(described)[0]
    assert shared is not None
    block, kind, lambda_search = shared

    def each() -> Iterator[Tensor]:
        shape, dtype = kind[0]
        here = states.hidden.rows() if states else None
        for _ in range(shape[0]):
            row = next(here) if here else torch.empty(shape[1:], dtype=dtype)
            comm.broadcast([row], 0)
            yield row[None]

    everywhere = StoredStates(ChunkedTensor(kind[0][0], kind[0][1], each), *kind[1:]) if kind else None

    def stored(index: int) -> tuple[Weights, dict[str, Tensor]]:
        return _stored_everywhere(comm, start.stored(index) if start else ({}, {}))

    return Start(block, everywhere, stored, lambda_search)


def _stored_everywhere(comm: Comm, stored: tuple[Weights, dict[str, Tensor]]) -> tuple[Weights, dict[str, Tensor]]:
    """A finished block of rank 0's work folder on every rank."""
    weights, changed = stored
    described = {linear: layout(weight) for linear, weight in weights.items()}
    layouts, shapes = comm.all_gather_object((described, {name: _shape(tensor) for name, tensor in changed.items()}))[0]
    for linear, own in layouts.items():
        if linear not in weights:
            weights[linear] = blank(*own)
        weight = weights[linear]
        comm.broadcast((weight.codes, weight.scales, weight.zeros), 0)
    for name, (shape, dtype) in shapes.items():
        changed.setdefault(name, torch.empty(shape, dtype=dtype))
        comm.broadcast([changed[name]], 0)
    return weights, changed


def _describe(states: StoredStates | None) -> Any:
    """All of it that is small: the hidden states' shape and dtype, and the rest as it is."""
    if states is None:
        return None
    return _shape(states.hidden), states.form, states.fingerprint, states.probe, states.reference


def _shape(tensor: Tensor | ChunkedTensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype

"""Entering a model in its middle: the blocks before are replaced by ones that return stored hidden states.

That is right only where blocks pass nothing else on. What a block is entered with apart from its hidden
states (masks, rotary tables, what other blocks have left in a shared dictionary) therefore has a fingerprint, taken
when hidden states are stored: where a forward that was handed them arrives with another one, the blocks have to be run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import getcurrent
from torch import Tensor, nn

from sarqc.pipeline.points import Arrival, first_tensor
from sarqc.pipeline.task import Task


def output_form(arrival: Arrival) -> str | None:
    """How a block that is left returns the stream: "tensor", or "tuple:stream,none"; None where it is in neither.

    What else a block returns (attention weights, say) is left out: if another block needs it, its fingerprint differs.
    """
    output, stream = arrival.output, arrival.tensor
    if isinstance(output, Tensor):
        return "tensor"
    if isinstance(output, tuple | list):
        kind = "tuple" if isinstance(output, tuple) else "list"
        return f"{kind}:" + ",".join("stream" if value is stream else "none" for value in output)
    return None


class ReplayBlock(nn.Module):
    """Replaces a block. hidden: the residual to return, by the number of the micro-batch; None: its input.

    Every other attribute is the block's own, because models read some ("attention_type").
    """

    def __init__(self, block: nn.Module, returns: str, hidden: Callable[[int], Tensor] | None) -> None:
        super().__init__()
        self.__dict__["block"] = block  # past nn.Module, which would register it as a child
        self.returns = returns
        self.hidden = hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stream, in the form in which the block returns it."""
        stream = first_tensor((*args, *kwargs.values()))
        task = getcurrent()
        if self.hidden is not None and isinstance(task, Task):
            stream = task.replayed = self.hidden(task.number)
        kind, _, names = self.returns.partition(":")
        if kind == "tensor":
            return stream
        values = [stream if name == "stream" else None for name in names.split(",")]
        return tuple(values) if kind == "tuple" else values


@contextmanager
def replaying(layers: nn.ModuleList, first: int, returns: str, hidden: Callable[[int], Tensor]) -> Iterator[None]:
    """Replace the blocks before `first`, for micro-batches that enter it within this context."""
    blocks = list(layers[:first])
    try:
        for index, block in enumerate(blocks):
            layers[index] = ReplayBlock(block, returns, hidden if index + 1 == first else None)
        yield
    finally:
        for index, block in enumerate(blocks):
            layers[index] = block


def fingerprint(entry: Arrival) -> str:
    """Of all that a block is entered with but for what enters it."""
    sums = hashlib.sha256()
    for part in _parts((entry.args, entry.kwargs), entry.tensor):
        sums.update(part)
    return sums.hexdigest()


def _parts(value: Any, stream: Tensor | None) -> Iterator[bytes]:
    if value is stream:
        yield b"stream;"
    elif isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)};".encode()
        yield value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        for key, inside in value.items():
            yield f"{key!r}:".encode()
            yield from _parts(inside, stream)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield f"{len(value)}[".encode()
        for inside in value:
            yield from _parts(inside, stream)
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        yield f"{value!r};".encode()
    else:
        yield f"{type(value).__qualname__};".encode()
        if not isinstance(value, type | nn.Module) and hasattr(value, "__dict__"):
            yield from _parts(vars(value), stream)

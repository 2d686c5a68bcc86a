"""Two checkpoints beside each other, tensor by tensor of the dense view: what a checkpoint became of its source.

The error of a weight is ||W - Q||_F / ||W||_F, W the source's weight and Q the dequantized one: 0 for the same numbers,
about 0.1 at 4 bits, 1 for a weight of zeros, 1.41 for another weight of the same size, 2 for the opposite sign. The
optimum for the layer's output lies above that of RTN: a little as a rule, but at 2 bits a solver may move a
weight by more than its own size, in directions that inputs hardly have. What tells such a weight from another one is
its share of the original, <W, Q> / <W, W>: near 1 in whatever was rounded from it, 0 in what has nothing to do with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sarqc.checkpoint.headers import bytes_of
from sarqc.checkpoint.reader import Checkpoint
from sarqc.method.weight import QuantizedWeight

WORST_ERROR = 1.2
LEAST_SHARE = 0.5
"""A weight with a larger error and a smaller share of the original is another one, or lies in another order."""


@dataclass(frozen=True)
class Compared:
    """A tensor of the dense view. error: of a quantized weight that has one to speak of, else None. problem: one line
    where the tensor is not what it should be."""

    error: float | None
    problem: str | None


def missing_names(checkpoint: Checkpoint, source: Checkpoint) -> Iterator[str]:
    """Names of the dense view that only one of the two has, a line each."""
    ours, theirs = set(checkpoint.names()), set(source.names())
    for name in sorted(ours ^ theirs):
        yield f"{(checkpoint if name not in ours else source).folder} lacks tensor {name!r}"


def compare(checkpoint: Checkpoint, source: Checkpoint, name: str, stored: Tensor | QuantizedWeight) -> Compared:
    """Dense tensor `name`, which is `stored` in `checkpoint`, against the one in `source`, which must have it."""
    shape = stored.shape if isinstance(stored, Tensor) else stored.codes.shape[1:]
    if tuple(shape) != source.shape(name):
        shapes = f"{list(shape)}, where {source.folder} has {list(source.shape(name))}"
        return Compared(None, f"{checkpoint.folder}: tensor {name!r} is {shapes}")
    if isinstance(stored, Tensor):
        return Compared(None, _copy(checkpoint, source, name, stored))
    return _weight(checkpoint, source, name, stored)


def other_names(checkpoint: Checkpoint, source: Checkpoint) -> str | None:
    """A line where two quantized checkpoints do not hold the same tensors and Linears."""
    if checkpoint.names() != source.names() or set(checkpoint.linears()) != set(source.linears()):
        return f"{checkpoint.folder} and {source.folder} hold tensors of other names"
    return None


def difference(
    checkpoint: Checkpoint, source: Checkpoint, name: str, stored: Tensor | QuantizedWeight
) -> Iterator[str]:
    """What differs between the tensor `name` of two quantized checkpoints; it is `stored` in `checkpoint`."""
    if isinstance(stored, Tensor):
        problem = _copy(checkpoint, source, name, stored)
        yield from () if problem is None else (problem,)
        return
    theirs = source.stored(name)
    for part in ("codes", "scales", "zeros"):
        mine, other = getattr(stored, part), getattr(theirs, part)
        if mine.shape != other.shape or mine.dtype != other.dtype or bytes_of(mine) != bytes_of(other):
            yield f"{checkpoint.folder}: {part} of {name!r} are not those in {source.folder}"


def _weight(checkpoint: Checkpoint, source: Checkpoint, name: str, stored: QuantizedWeight) -> Compared:
    """A quantized weight against what it stands for."""
    weight, quantized = source.load(name).float(), stored.dequantize()[0]
    size, distance = _norm(weight), _norm(quantized - weight)
    error = distance / size if size else 0.0 if not distance else math.inf
    kept = error <= WORST_ERROR  # False for NaN too
    if kept or (math.isfinite(error) and _inner(quantized, weight) >= LEAST_SHARE * size**2):
        return Compared(error, None)
    how = f"{error:.3g} of its size away from" if size else f"{distance:.3g} away from zero, which is"
    return Compared(None, f"{checkpoint.folder}: {name!r} is {how} the weight in {source.folder}")


def _norm(matrix: Tensor) -> float:
    """Of rows in fp32, of their norms in fp64: as good as fp64 throughout, without copies in it."""
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=-1), dtype=torch.float64))


def _inner(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum(-1).sum(dtype=torch.float64))


def _copy(checkpoint: Checkpoint, source: Checkpoint, name: str, ours: Tensor) -> str | None:
    """A line for a tensor that was to be left as it was, and was not."""
    theirs = source.load(name)
    if ours.dtype == theirs.dtype and bytes_of(ours) == bytes_of(theirs):
        return None
    return f"{checkpoint.folder}: tensor {name!r} is not the one in {source.folder}"

"""Memory watched while the interpreter runs: reads and writes out of bounds, races between the programs of a launch.

The interpreter runs programs one after another on real memory, so a read behind the end of a tensor gives some number,
and two programs that write one place give the last one's. Here every address that is not masked has to lie within the
memory of a tensor that the launch got, and no program may read or write what another one writes: on a GPU their order
is open. Races between threads of one program, which a barrier prevents, are not seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = ["Memory"]

MOST_BYTES = 1 << 22
"""Of a tensor whose readers and writers are remembered; larger ones are held to their bounds alone."""

NOBODY, SEVERAL = -1, -2


class Region:
    """The memory of one tensor: who read and who wrote each byte."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.end = start, start + size
        kept = size if size <= MOST_BYTES else 0
        self.readers, self.writers = (np.full(kept, NOBODY, np.int32) for _ in range(2))


class Memory:
    """What the programs of the launch that runs now may touch, and what they touched."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.program = (0, 0, 0)
        self.number = 0

    def begin(self, arguments: Iterable[Any]) -> None:
        """A launch with these arguments: tensors, descriptors, tuples of them, and what else there is."""
        addresses: dict[int, int] = {}
        for tensor in _tensors(arguments):
            storage = tensor.untyped_storage()
            addresses[storage.data_ptr()] = storage.nbytes()
        self.regions = [Region(start, size) for start, size in addresses.items()]
        self.number = 0

    def enter(self, program: tuple[int, int, int]) -> None:
        """The program with these ids runs from now on."""
        self.program = program
        self.number += 1

    def load(self, addresses: np.ndarray, mask: np.ndarray, width: int) -> None:
        """Raises AssertionError where a program must not read."""
        for region, places in self._places(addresses, mask, width, "reads"):
            self._alone(region.writers[places], "reads what another program writes")
            before = region.readers[places]
            region.readers[places] = np.where((before == NOBODY) | (before == self.number), self.number, SEVERAL)

    def store(self, addresses: np.ndarray, mask: np.ndarray, width: int) -> None:
        """Raises AssertionError where a program must not write."""
        for region, places in self._places(addresses, mask, width, "writes"):
            self._alone(region.writers[places], "writes what another program writes")
            self._alone(region.readers[places], "writes what another program reads")
            region.writers[places] = self.number

    def _alone(self, others: np.ndarray, what: str) -> None:
        assert ((others == NOBODY) | (others == self.number)).all(), f"a race: program {self.program} {what}"

    def _places(self, addresses: np.ndarray, mask: np.ndarray, width: int, verb: str) -> Iterable[tuple[Region, Any]]:
        """(region, bytes in it) of those that are remembered; all addresses are held to the bounds."""
        wanted = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))
        wanted = wanted[np.broadcast_to(mask.astype(bool), wanted.shape)].astype(np.int64)  # some masks are integers
        inside = 0
        for region in self.regions:
            own = wanted[(wanted >= region.start) & (wanted + width <= region.end)]
            inside += own.size
            if own.size and region.readers.size:
                yield region, ((own - region.start)[:, None] + np.arange(width)).reshape(-1)
        assert inside == wanted.size, f"out of bounds: program {self.program} {verb} beside all tensors of the launch"


def _tensors(arguments: Iterable[Any]) -> Iterable[Any]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif hasattr(argument, "block_shape"):
            yield argument.base
        elif hasattr(argument, "untyped_storage"):
            yield argument

"""The next block's tensors, read in the background while the block before is at work.

Reading waits for the disk and solving for the processor, so they do not stand in each other's way. What is read are
the same tensors in the same order; only when is another matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from sarqc.method.weight import QuantizedWeight
from sarqc.model.source import TensorSource


class Ahead:
    """A source, one step ahead of whoever loads from it. A context: its thread has ended when that ends.

    The source is asked from another thread. What goes wrong there is raised when the tensor is loaded.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._coming: dict[str, Future[Tensor]] = {}

    def read(self, names: Iterable[str]) -> None:
        """Begin to read these tensors; what was read before and not loaded is dropped."""
        self._drop()
        self._coming = {name: self._reader.submit(self._source.load, name) for name in names}

    def load(self, name: str) -> Tensor:
        """The tensor, which may have been read already; it is handed out once."""
        coming = self._coming.pop(name, None)
        return self._source.load(name) if coming is None else coming.result()

    def names(self) -> list[str]:
        """Names of the source's tensors."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._source.dtype(name)

    def quantized(self, linear: str) -> QuantizedWeight | None:
        """Codes of a linear layer, or None where it is dense."""
        return self._source.quantized(linear)

    def _drop(self) -> None:
        for coming in self._coming.values():
            coming.cancel()
        self._coming.clear()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._drop()
        self._reader.shutdown(wait=True)

"""Where weights come from: a protocol, so that `model` needs to know no file format.

The room that knows files implements `TensorSource`; nothing here knows shards, formats or folders. A quantized
checkpoint looks like a dense one (`load` dequantizes), and hands out its codes through `quantized`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sarqc.contexts import Closing
from sarqc.conventions import MatrixSlice
from sarqc.errors import ModelError
from sarqc.method.weight import QuantizedWeight


class TensorSource(Protocol):
    """Named tensors that are read one at a time; `shape` and `dtype` cost no reading."""

    def names(self) -> list[str]:
        """Names of the dense tensors, as the checkpoint has them ("model.layers.0.self_attn.q_proj.weight")."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a dense tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a dense tensor."""

    def load(self, name: str) -> Tensor:
        """The dense tensor, on the CPU, in memory of its own."""

    def quantized(self, linear: str) -> QuantizedWeight | None:
        """Codes of a linear layer (its name without ".weight", E = 1), or None where it is stored dense."""


@dataclass(frozen=True)
class HeaderSource:
    """A `TensorSource` without tensors. tensors: (shape, dtype) by the checkpoint's names."""

    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> HeaderSource:
        """The names, shapes and dtypes of these tensors."""
        return cls({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})

    def split(self, slices: Mapping[str, MatrixSlice]) -> HeaderSource:
        """The source with single experts in the place of tensors of all experts."""
        whole = {part.tensor for part in slices.values()}
        plain = {name: header for name, header in self.tensors.items() if name not in whole}
        return HeaderSource(plain | {name: (part.shape, self.tensors[part.tensor][1]) for name, part in slices.items()})

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.tensors[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self.tensors[name][1]

    def load(self, name: str) -> Tensor:
        """`ModelError`: there is nothing to load."""
        raise ModelError(f"tensor {name!r} is not on this machine: fetch the model's weights first")

    def quantized(self, linear: str) -> QuantizedWeight | None:
        """None: nothing is known to be quantized."""
        return None


class _Wrapper(TensorSource):
    """A source over another one."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    def names(self) -> list[str]:
        """Names of all dense tensors."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a dense tensor."""
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a dense tensor."""
        return self._source.dtype(name)

    def load(self, name: str) -> Tensor:
        """The dense tensor."""
        return self._source.load(name)

    def quantized(self, linear: str) -> QuantizedWeight | None:
        """Codes of a linear layer, or None where it is dense."""
        return self._source.quantized(linear)


class PatchedSource(_Wrapper):
    """A source with some linear layers quantized in memory: what a checkpoint of them would read back as.

    quantized: by name without ".weight", E = 1. changed: other tensors that take the place of the source's.
    """

    def __init__(
        self,
        source: TensorSource,
        quantized: Mapping[str, QuantizedWeight],
        changed: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(source)
        self._quantized = {f"{linear}.weight": weight for linear, weight in quantized.items()}
        self._changed = dict(changed or {})

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a dense tensor; that of its scales where it is quantized."""
        if name in self._quantized:
            return self._quantized[name].scales.dtype
        return self._changed[name].dtype if name in self._changed else super().dtype(name)

    def load(self, name: str) -> Tensor:
        """The dense tensor, dequantized where need be."""
        if name in self._quantized:
            return self._quantized[name].dequantize(self._quantized[name].scales.dtype)[0].cpu()
        return self._changed[name].to("cpu", copy=True) if name in self._changed else super().load(name)

    def quantized(self, linear: str) -> QuantizedWeight | None:
        """Codes of a linear layer, or None where it is dense."""
        return self._quantized.get(f"{linear}.weight") or super().quantized(linear)


class PrefetchingSource(_Wrapper, Closing):
    """A source that reads the next tensors in a background thread. A context manager: the thread ends with it.

    Reading waits for the disk and quantization for the processor, so the two overlap. The tensors and their order are
    the same. Errors of the thread are raised when the tensor is loaded.
    """

    def __init__(self, source: TensorSource) -> None:
        super().__init__(source)
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._coming: dict[str, Future[Tensor]] = {}

    def read(self, names: Iterable[str]) -> None:
        """Start reading these tensors; those read before and not loaded are dropped."""
        self._drop()
        self._coming = {name: self._reader.submit(self._source.load, name) for name in names}

    def load(self, name: str) -> Tensor:
        """The tensor, prefetched or not; a prefetched tensor is returned once."""
        coming = self._coming.pop(name, None)
        return self._source.load(name) if coming is None else coming.result()

    def _drop(self) -> None:
        for coming in self._coming.values():
            coming.cancel()
        self._coming.clear()

    def close(self) -> None:
        """End the thread; what it has read is dropped."""
        self._drop()
        self._reader.shutdown(wait=True)

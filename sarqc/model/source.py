"""Where weights come from: a protocol, so that `model` needs to know no file format.

The room that knows files implements `TensorSource`; nothing here knows shards, formats or folders. A quantized
checkpoint looks like a dense one (`load` dequantizes), and hands out its codes through `quantized`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from sarqc.errors import ModelError
from sarqc.method.weight import QuantizedWeight, WeightInfo


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


class PackedSource(TensorSource, Protocol):
    """A source that can also say how its quantized linear layers are stored, and store them again."""

    def linears(self) -> list[str]:
        """Names of the quantized linear layers, without ".weight"."""

    def describe(self, linear: str) -> WeightInfo:
        """What a quantized linear layer is; costs no reading of weights."""

    def raw_members(self, linear: str) -> tuple[str, ...]:
        """Names of the tensors that a quantized linear layer is stored as."""

    def packer(self, linear: str) -> Callable[[QuantizedWeight], dict[str, Tensor]]:
        """Makes those tensors of a weight (E = 1); works when the source is closed."""


class StateDictSource:
    """A source over tensors that are already in memory, with some weights optionally quantized.

    tensors: dense tensors by name. quantized: linear layers by name (without ".weight"), E = 1; they join the dense
    view as `dtype`.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        quantized: Mapping[str, QuantizedWeight] | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._tensors = dict(tensors)
        self._quantized = {f"{linear}.weight": weight for linear, weight in (quantized or {}).items()}
        self._dtype = dtype

    def names(self) -> list[str]:
        """Names of all dense tensors, sorted."""
        return sorted(self._tensors.keys() | self._quantized.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a dense tensor."""
        if name in self._quantized:
            return tuple(self._quantized[name].codes.shape[1:])
        return tuple(self._tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a dense tensor."""
        return self._dtype if name in self._quantized else self._tensor(name).dtype

    def load(self, name: str) -> Tensor:
        """A copy of the dense tensor, on the CPU."""
        if name in self._quantized:
            return self._quantized[name].dequantize(self._dtype)[0].cpu()
        return self._tensor(name).detach().to("cpu", copy=True)

    def quantized(self, linear: str) -> QuantizedWeight | None:
        """Codes of a linear layer, or None where it is dense."""
        return self._quantized.get(f"{linear}.weight")

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise ModelError(f"tensor {name!r} is not in this source: it has {len(self._tensors)} others")
        return self._tensors[name]


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


class PrefetchingSource(_Wrapper):
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

    def __enter__(self) -> PrefetchingSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._drop()
        self._reader.shutdown(wait=True)

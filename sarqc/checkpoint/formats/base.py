"""What a format must do, and the little that it says about a packed weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sarqc.config import QuantConfig
from sarqc.errors import CheckpointError
from sarqc.method.weight import QuantizedWeight, WeightInfo


class TensorInfo(Protocol):
    """Shape and dtype of a tensor that need not be in memory; a `Tensor` is one too."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""


Widths = Mapping[str, int] | None
Info = Callable[[str], TensorInfo]
Load = Callable[[str], Tensor]


class Format(Protocol):
    """One layout on disk.

    `quantization` is the `quantization_config` of config.json. `linear` is a module's name, without ".weight".
    All raise `CheckpointError` for tensors or a config that the format does not explain.
    """

    @property
    def name(self) -> str:
        """Name in the table."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of config.json that `quantization` stands under."""

    @property
    def stacked(self) -> bool:
        """Whether the matrices of all experts of a layer are one tensor, under the names of `stacked`."""

    def detects(self, quantization: Mapping[str, Any]) -> bool:
        """Whether `quantization` says that a checkpoint is in this format."""

    def check(self, quant: QuantConfig) -> None:
        """Refuses what the format cannot hold; called before calibration starts."""

    def check_layer(self, linear: str, shape: tuple[int, int], quant: QuantConfig) -> None:
        """Refuses a Linear whose weight [N, K] the format cannot hold; called for each before calibration starts."""

    def check_head(self, linear: str) -> None:
        """Refuses a quantized Linear behind the blocks that the format has no place for; called as `check_layer` is."""

    def check_embedding(self, linear: str) -> None:
        """Refuses a quantized embedding that the format has no place for; called as `check_layer` is."""

    def check_dense(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuses a tensor that is not quantized and cannot stand beside those that are."""

    def pack(self, linear: str, weight: QuantizedWeight, quant: QuantConfig) -> dict[str, Tensor]:
        """The tensors on disk, by full name, of `weight` (E = 1), which must be as `quant` says."""

    def config(self, quant: QuantConfig, ignored: Sequence[str], widths: Widths = None) -> dict[str, Any]:
        """The `quantization_config` to write; `ignored` are the full names of the Linears left unquantized.

        widths: bits of every quantized Linear; needed where `quant` lets them differ (`avg_bits`) or one of them stands
            outside the blocks.
        """

    def also(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Keys that readers of the format want in config.json and that `config`, the model's own, may lack."""

    def ignored(self, quantization: Mapping[str, Any]) -> tuple[str, ...]:
        """What a config names as left unquantized, without its patterns: the other way round of `config`."""

    def side_files(self, quantization: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """JSON files that readers of the format want beside config.json, by name."""

    def linears(self, names: Iterable[str], quantization: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        """The quantized Linears among the tensor names of a checkpoint, each with the tensors that make it up."""

    def describe(self, linear: str, quantization: Mapping[str, Any], info: Info, load: Load) -> WeightInfo:
        """Checks the tensors of `linear` against each other from their headers, and says what weight they hold."""

    def unpack(self, linear: str, quantization: Mapping[str, Any], load: Load) -> QuantizedWeight:
        """Codes, scales and zeros of `linear`; E = 1."""


class FormatDefaults:
    """What most formats have in common."""

    name: str
    keys: tuple[str, ...] = ("quantization_config",)
    stacked = False

    def check_layer(self, linear: str, shape: tuple[int, int], quant: QuantConfig) -> None:
        """Any size that has whole groups can be held."""

    def check_head(self, linear: str) -> None:
        """A head can be held as any Linear."""

    def check_embedding(self, linear: str) -> None:
        """None: readers of most formats look tokens up in dense embeddings alone."""
        raise CheckpointError(
            f"{linear!r} cannot be held by {self.name}, whose readers have no quantized embeddings: leave it out of "
            "include, or use format compressed-tensors or mlx"
        )

    def check_dense(self, name: str, shape: tuple[int, ...]) -> None:
        """Any tensor can stand beside the quantized ones."""

    def also(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """None: the model's config has all they want."""
        return {}

    def side_files(self, quantization: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """None: config.json says it all."""
        return {}

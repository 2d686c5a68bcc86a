"""A seat in transformers' two tables of quantizers. Light on purpose: it is taken in the middle of its import.

The tables are keyed by `quant_method`, and a method that transformers knows is taken already: registering it again is
refused there. So the entry is replaced by one that asks first, for each checkpoint, whether it can be kept packed, and
otherwise gives transformers what it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

if TYPE_CHECKING:
    from sarqc.model.pretrained import Open

__all__ = ["leave", "take"]


@dataclass(frozen=True)
class Seat:
    """Stands in both tables for one `quant_method`.

    config, quantizer: transformers' own entries. takes: whether a checkpoint with this
    `quantization_config` can be kept packed. open_source: opens it.
    """

    config: Any
    quantizer: Any
    takes: Callable[[Mapping[str, Any]], bool]
    open_source: Open

    def from_dict(self, values: dict[str, Any], **kwargs: Any) -> Any:
        """What transformers calls on the entry of its table of configurations."""
        if self.takes(values):
            from sarqc.model.pretrained import PackedConfig

            return PackedConfig(**values)
        return self.config.from_dict(values, **kwargs)

    def __call__(self, config: Any, **kwargs: Any) -> Any:
        """What transformers calls on the entry of its table of quantizers."""
        from sarqc.model.pretrained import PackedConfig, PackedQuantizer

        if isinstance(config, PackedConfig):
            return PackedQuantizer(config, open_source=self.open_source, **kwargs)
        return self.quantizer(config, **kwargs)


def take(methods: Iterable[str], takes: Callable[[Mapping[str, Any]], bool], open_source: Open) -> None:
    """Sit down for those of these methods that transformers knows; where we sit already, nothing happens."""
    for method in methods:
        config = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
        if config is not None and not isinstance(config, Seat):
            seat = Seat(config, AUTO_QUANTIZER_MAPPING[method], takes, open_source)
            AUTO_QUANTIZATION_CONFIG_MAPPING[method] = AUTO_QUANTIZER_MAPPING[method] = seat


def leave() -> None:
    """Give transformers its own entries back."""
    for method, seat in list(AUTO_QUANTIZATION_CONFIG_MAPPING.items()):
        if isinstance(seat, Seat):
            AUTO_QUANTIZATION_CONFIG_MAPPING[method] = seat.config
            AUTO_QUANTIZER_MAPPING[method] = seat.quantizer

"""`import sarqc` lets transformers keep the weights of quantized checkpoints packed, and imports neither it nor torch.

transformers has no list of plugins to stand in: whoever adds a quantizer has to have been imported and to write into
its tables. So that importing sarqc stays free, the writing waits for transformers: if its tables are there it is done
at once, otherwise a finder at the front of `sys.meta_path` watches for the one module that holds them, steps aside, and
acts when that module has run. `unregister` is the way out.

The tables are keyed by `quant_method`, and a method that transformers knows is taken already: registering it again is
refused there. So the entry is replaced by one that asks first, for each checkpoint, whether it can be kept packed, and
otherwise gives transformers what it had. That happens in the middle of transformers' own import: nothing here asks for
more of it than the tables.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sarqc.integrations.hf_quantizer import Open

__all__ = ["register", "unregister"]

TABLES = "transformers.quantizers.auto"


def register() -> None:
    """Let `from_pretrained` keep checkpoints packed where `sarqc_kernels` can run them; `import sarqc` calls this.

    That is: weights alone are quantized, in a format that sarqc reads. Others load as without sarqc.
    """
    if TABLES in sys.modules:
        _patch_tables()
    elif not _waiting():
        sys.meta_path.insert(0, PostImportHook(TABLES, _patch_tables))


def unregister() -> None:
    """Give transformers its own loading back: quantized weights are expanded by the library that their format names."""
    for finder in _waiting():
        sys.meta_path.remove(finder)
    if TABLES in sys.modules:
        _restore_tables()


def _waiting() -> list[PostImportHook]:
    return [finder for finder in sys.meta_path if isinstance(finder, PostImportHook)]


class PostImportHook(MetaPathFinder):
    """Finds nothing itself: calls `act` once, right after the module `name` has been imported by whoever finds it."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self.name, self.act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the others find, with a loader that calls `act` afterwards."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                self.act()

            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


@dataclass(frozen=True)
class TableEntry:
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
            from sarqc.integrations.hf_quantizer import PackedConfig

            return PackedConfig(**values)
        return self.config.from_dict(values, **kwargs)

    def __call__(self, config: Any, **kwargs: Any) -> Any:
        """What transformers calls on the entry of its table of quantizers."""
        from sarqc.integrations.hf_quantizer import PackedConfig, PackedQuantizer

        if isinstance(config, PackedConfig):
            return PackedQuantizer(config, open_source=self.open_source, **kwargs)
        return self.quantizer(config, **kwargs)


def _patch_tables() -> None:
    """Sit down for those of our formats that transformers knows; where we sit already, nothing happens."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    from sarqc.checkpoint.formats import FORMATS
    from sarqc.checkpoint.reader import open_checkpoint

    for method in FORMATS:
        config = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
        if config is not None and not isinstance(config, TableEntry):
            entry = TableEntry(config, AUTO_QUANTIZER_MAPPING[method], can_pack, open_checkpoint)
            AUTO_QUANTIZATION_CONFIG_MAPPING[method] = AUTO_QUANTIZER_MAPPING[method] = entry


def _restore_tables() -> None:
    """Give transformers its own entries back."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    for method, entry in list(AUTO_QUANTIZATION_CONFIG_MAPPING.items()):
        if isinstance(entry, TableEntry):
            AUTO_QUANTIZATION_CONFIG_MAPPING[method] = entry.config
            AUTO_QUANTIZER_MAPPING[method] = entry.quantizer


def can_pack(quantization: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this `quantization_config` is one of packed integer weights alone, which we run.

    False for formats that are not read here and for ones that quantize more (activations, the KV cache).
    """
    from sarqc.checkpoint.formats import detect
    from sarqc.errors import CheckpointError

    known = detect({"quantization_config": quantization})
    if known is None or quantization.get("kv_cache_scheme"):
        return False
    try:
        known.linears((), quantization)
    except CheckpointError:
        return False
    return True

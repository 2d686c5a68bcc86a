"""`import sarqc` registers a quantizer with transformers that keeps weights packed; it imports neither it nor torch.

transformers has no plugin list: a quantizer has to be written into its tables. To keep `import sarqc` light, that waits
for transformers. If its tables are imported already they are patched at once; otherwise a finder at the front of
`sys.meta_path` patches them right after their module has run. `unregister` undoes both.

The tables are keyed by `quant_method`, and transformers refuses to register a known method again. So each entry is
replaced by one that decides per checkpoint: packed where sarqc can run it, otherwise what transformers had. This runs
in the middle of transformers' own import, so only the tables are used here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register", "unregister"]

TABLES = "transformers.quantizers.auto"


def register() -> None:
    """Let `from_pretrained` keep checkpoints packed where `sarqc_kernels` can run them; `import sarqc` calls this.

    That covers weight-only quantization in formats that sarqc reads. Other checkpoints load as without sarqc.
    """
    if TABLES in sys.modules:
        _patch_tables()
    elif not _hooks():
        sys.meta_path.insert(0, PostImportHook(TABLES, _patch_tables))


def unregister() -> None:
    """Restore the loading of transformers: the library of each format expands the weights."""
    for finder in _hooks():
        sys.meta_path.remove(finder)
    if TABLES in sys.modules:
        _restore_tables()


def _hooks() -> list[PostImportHook]:
    return [finder for finder in sys.meta_path if isinstance(finder, PostImportHook)]


class PostImportHook(MetaPathFinder):
    """A finder that finds nothing itself: calls `act` once, right after the module `name` was imported."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self.name, self.act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the other finders, with a loader that calls `act` afterwards."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                self.act()

            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]  # the point of the hook
        return spec


@dataclass(frozen=True)
class TableEntry:
    """Replaces the entry of one `quant_method` in both tables.

    config, quantizer: transformers' own entries.
    """

    config: Any
    quantizer: Any

    def from_dict(self, values: dict[str, Any], **kwargs: Any) -> Any:
        """What transformers calls on the entry of its table of configurations."""
        if can_pack(values):
            from sarqc.integrations.hf_quantizer import PackedConfig

            return PackedConfig(**values)
        return self.config.from_dict(values, **kwargs)

    def __call__(self, config: Any, **kwargs: Any) -> Any:
        """What transformers calls on the entry of its table of quantizers."""
        from sarqc.integrations.hf_quantizer import PackedConfig, PackedQuantizer

        if isinstance(config, PackedConfig):
            return PackedQuantizer(config, **kwargs)
        return self.quantizer(config, **kwargs)


def _patch_tables() -> None:
    """Replace the entries of the formats that transformers knows; idempotent."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    from sarqc.checkpoint.formats import FORMATS

    for method in FORMATS:
        config = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
        if config is not None and not isinstance(config, TableEntry):
            entry = TableEntry(config, AUTO_QUANTIZER_MAPPING[method])
            AUTO_QUANTIZATION_CONFIG_MAPPING[method] = AUTO_QUANTIZER_MAPPING[method] = entry


def _restore_tables() -> None:
    """Restore transformers' own entries."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    for method, entry in list(AUTO_QUANTIZATION_CONFIG_MAPPING.items()):
        if isinstance(entry, TableEntry):
            AUTO_QUANTIZATION_CONFIG_MAPPING[method] = entry.config
            AUTO_QUANTIZER_MAPPING[method] = entry.quantizer


def can_pack(quantization: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this `quantization_config` has packed integer weights only, which sarqc runs.

    False for formats that sarqc does not read and for those that quantize more (activations, the KV cache).
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

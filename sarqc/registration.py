"""`import sarqc` lets transformers keep the weights of quantized checkpoints packed, and imports neither it nor torch.

transformers has no list of plugins to stand in: whoever adds a quantizer has to have been imported and to write into
its tables. So that importing sarqc stays free, the writing waits for transformers: if its tables are there it is done
at once, otherwise a finder at the front of `sys.meta_path` watches for the one module that holds them, steps aside, and
acts when that module has run. `unregister` is the way out.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register", "unregister"]

TABLES = "transformers.quantizers.auto"


def register() -> None:
    """Let `from_pretrained` keep checkpoints packed where `sarqc_kernels` can run them; `import sarqc` calls this.

    That is: weights alone are quantized, in a format that sarqc reads. Others load as without sarqc.
    """
    if TABLES in sys.modules:
        _take_seats()
    elif not _waiting():
        sys.meta_path.insert(0, _After(TABLES, _take_seats))


def unregister() -> None:
    """Give transformers its own loading back: quantized weights are expanded by the library that their format names."""
    for finder in _waiting():
        sys.meta_path.remove(finder)
    if TABLES in sys.modules:
        from sarqc.job.pretrained import leave_seats

        leave_seats()


def _take_seats() -> None:
    from sarqc.job.pretrained import take_seats

    take_seats()


def _waiting() -> list[_After]:
    return [finder for finder in sys.meta_path if isinstance(finder, _After)]


class _After(MetaPathFinder):
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

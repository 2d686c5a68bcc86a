"""Run a module with Triton's cache open to other Pythons: `python -m benchmarks.first_run.portable MODULE ARGUMENTS`.

Triton's cache key holds a hash of its own compiled library, which differs between wheels of one version for different
Pythons. What they compile does not. Here the key holds the version alone, for the process and its children.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

__all__ = ["patch", "relocate"]


def patch() -> None:
    """Replace the part of the key, wherever this version of Triton keeps it; without Triton nothing happens."""
    try:
        import triton
        import triton.compiler.compiler as compiler
        import triton.runtime.cache as cache
    except ImportError:
        return
    for module in (compiler, cache):
        if hasattr(module, "triton_key"):
            module.triton_key = lambda: f"sarqc first run, triton {triton.__version__}"


def relocate(folder: Path) -> int:
    """Make a Triton cache that was carried to `folder` valid there; returns its number of kernels.

    Triton writes down with whole paths which files belong to a kernel, and compiles again where they do not exist.
    """
    groups = sorted(folder.rglob("__grp__*.json"))
    for group in groups:
        content = json.loads(group.read_text())
        content["child_paths"] = {name: str(group.parent / name) for name in content["child_paths"]}
        group.write_text(json.dumps(content))
    return len(groups)


if __name__ == "__main__":
    patch()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

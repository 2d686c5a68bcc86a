"""Run a module with Triton's cache open to other Pythons: `python -m benchmarks.first_run.portable MODULE ARGUMENTS`.

Triton's cache key holds a hash of its own compiled library, which differs between wheels of one version for different
Pythons. What they compile does not. Here the key holds the version alone, for the process and its children.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path

__all__ = ["NOTE", "REHEARSE", "SITE", "STUBS", "kernels", "made_with", "patch", "relocate", "variables", "version"]

REHEARSE = "SARQC_REHEARSE"
"""Environment variable with which a process has a GPU that is not there (`rehearsal`)."""

NOTE = "triton.txt"
"""File of a cache with the version of Triton that compiled it."""


SITE = "site"
"""Folder of a cache with packages; each is an import name."""


STUBS = ("__triton_launcher", "cuda_utils")
"""Names of what triton builds by gcc on the machine with the card, up to a second each: a launcher for each signature
of a kernel, and what asks the driver. They are of one Python and link the driver, so a cache does not carry them."""


def variables(cache: Path) -> dict[str, str]:
    """Environment variables with which a process takes kernels, libraries and packages from a cache."""
    result = {"TRITON_CACHE_DIR": str(cache / "triton"), "SARQC_CACHE": str(cache / "sarqc")}
    names = [path.name for path in (cache / SITE).glob("[!_]*") if path.is_dir() and path.suffix != ".dist-info"]
    if any(importlib.util.find_spec(name) is None for name in names):  # another Python's would hide our own
        paths = [os.environ.get("PYTHONPATH"), str(cache / SITE)]
        result["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return result


def version() -> str:
    """Of Triton in this environment; "none" without it. Does not import it."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def made_with(cache: Path) -> str:
    """The version that compiled a cache; "unknown" where it does not say."""
    note = cache / NOTE
    return note.read_text().strip() if note.exists() else "unknown"


def kernels(cache: Path) -> set[str]:
    """What a cache holds: Triton's kernels and stubs, and the libraries of nvcc, as paths in it."""
    kinds = ("triton/*/*.cubin", *(f"triton/*/{name}*.so" for name in STUBS), "sarqc/*.so")
    return {str(path.relative_to(cache)) for kind in kinds for path in cache.glob(kind)}


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
    if REHEARSE in os.environ:
        from benchmarks.first_run import rehearsal

        rehearsal.begin()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

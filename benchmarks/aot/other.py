"""Another version of Triton beside the installed one, in a folder that only checks use."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

__all__ = ["paths_of"]

ROOT = Path(__file__).parents[2]


def paths_of(version: str) -> str:
    """PYTHONPATH of a process that imports this version, installed into build/ where it is not the one at hand.

    Raises RuntimeError where it cannot be installed.
    """
    own = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if version == importlib.metadata.version("triton"):
        return os.pathsep.join(own)
    folder = ROOT / "build" / f"triton-{version}"
    if not folder.exists():
        part = folder.with_suffix(".part")
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(part)]
        if subprocess.run([*install, f"triton=={version}"]).returncode:
            raise RuntimeError(f"triton {version} cannot be installed here")
        part.rename(folder)
    return os.pathsep.join([str(folder), *own])

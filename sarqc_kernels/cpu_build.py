"""C++ for the CPU on first use: csrc/<name>.cpp through the host's compiler into the user's cache, loaded with ctypes.

Like `build.py`, without CUDA: the sources export plain C functions that take pointers, so a build takes a few seconds
and needs a C++ compiler and nothing else. A library's name holds a hash of its source, the headers, the flags and the
compiler's version. Vector instructions are those that torch itself uses on this processor, so machines of different
kinds can share a cache. SARQC_CXX names another compiler; where it is empty, nothing is built.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from sarqc_kernels.build import cache_folder, sources
from sarqc_kernels.errors import BackendError

__all__ = ["COMPILER", "compile_library", "compiler", "flags", "library"]

COMPILER = "SARQC_CXX"

_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_VECTORS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}


def compiler() -> str:
    """Path of a C++ compiler. Raises BackendError where there is none."""
    chosen = os.environ.get(COMPILER)
    for name in ("c++", "g++", "clang++") if chosen is None else (chosen,):
        if executable := shutil.which(name):
            return executable
    raise BackendError(
        f"{COMPILER} = {chosen!r} is no compiler: name one, or leave {COMPILER} unset" if chosen is not None else
        f"there is no C++ compiler on PATH: install g++ or clang++, or name one in {COMPILER}"
    )  # fmt: skip


def flags() -> tuple[str, ...]:
    """What the compiler gets: no contraction of a product and a sum, and the vectors that torch uses here."""
    return (*_FLAGS, *_VECTORS.get(torch.backends.cpu.get_cpu_capability(), ()))


def compile_library(name: str) -> Path:
    """The shared library of csrc/<name>.cpp, built now if the cache does not hold it.

    Raises BackendError with the reason where it cannot be built.
    """
    tool, source, wanted = compiler(), sources() / f"{name}.cpp", flags()
    try:
        version = subprocess.run([tool, "--version"], capture_output=True, text=True, errors="replace").stdout
        texts = (source.read_text(), *(header.read_text() for header in sorted(sources().glob("*.h"))))
        key = hashlib.sha256("\n".join((version, *wanted, *texts)).encode()).hexdigest()[:16]
        cache = cache_folder()
        target = cache / f"{name}-{key}.so"
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                made = Path(folder) / target.name
                command = [tool, *wanted, str(source), "-o", str(made)]
                done = subprocess.run(command, capture_output=True, text=True, errors="replace")
                if done.returncode:
                    message = " ".join((done.stderr.strip() or done.stdout.strip() or "no message").split())
                    raise BackendError(f"{tool} failed for {source.name}: {message[:400]}")
                made.replace(target)  # at once, so that processes may race
    except OSError as error:
        raise BackendError(f"cannot build {source.name}: {error}; set SARQC_CACHE to a folder to build in") from error
    return target


@functools.cache
def library(name: str, **structures: type[ctypes.Structure]) -> ctypes.CDLL:
    """csrc/<name>.cpp as a loaded library, kept for the life of the process.

    structures: of each function sarqc_<name>(structure, part, parts) the structure that it takes. Raises BackendError
    with the reason where there is no library, or an old one.
    """
    path = compile_library(name)
    try:
        made = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"{path} was built but does not load: {error}") from error
    for what, structure in structures.items():
        size = getattr(made, f"sarqc_{what}_size")
        size.restype = ctypes.c_int64
        if size() != ctypes.sizeof(structure):
            raise BackendError(f"the struct of sarqc_{what} has {size()} bytes in csrc and "
                               f"{ctypes.sizeof(structure)} here: reinstall")  # fmt: skip
        function = getattr(made, f"sarqc_{what}")
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64), None
    return made

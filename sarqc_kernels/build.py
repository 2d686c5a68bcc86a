"""CUDA C++ on first use: csrc/<name>.cu through nvcc into the user's cache, then loaded with ctypes.

The sources include no header of torch: they export plain C functions that take pointers and a stream, so a build takes
seconds, needs nvcc and a host compiler and nothing else, and one library serves every version of torch. A library's
name holds a hash of all that shaped it (every source in csrc/, GPU, flags, version of nvcc), so a stale one is never
loaded. One process of a machine compiles it under a file lock while the others wait, and says so in the log; it is
moved into place at once. That the GPU can run it is asked of the library itself (`sarqc_ready`), before the first call
and on the device of that call: any other would get a CUDA context for nothing.

The cache is $SARQC_CACHE, or else sarqc/ in $XDG_CACHE_HOME or ~/.cache. The CUDA runtime is linked in statically: it
joins the context that torch made, whichever runtime torch brought along.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from sarqc_kernels.errors import BackendError

try:
    import fcntl
except ImportError:  # not on Windows: processes may then compile the same library side by side
    fcntl = None  # type: ignore[assignment]

__all__ = ["FLAGS", "arch_name", "cache_folder", "compile_library", "library", "nvcc", "sources", "unsupported_reason"]

FLAGS = ("-std=c++17", "-O3", "--shared", "-Xcompiler", "-fPIC", "--cudart=static")

LOG = logging.getLogger("sarqc_kernels")

HERE = Path(__file__).parent
PLACES = (HERE / "csrc", HERE.parent / "csrc")  # of an installed package, of a checkout


def sources() -> Path:
    """The folder of the .cu files. Raises BackendError where the package came without them."""
    for place in PLACES:
        if any(place.glob("*.cu")):
            return place
    raise BackendError(f"no csrc/*.cu beside {HERE}: install the package with its sources")


def nvcc() -> str:
    """Path of nvcc: on PATH, in $CUDA_HOME/bin, or in /usr/local/cuda/bin. Raises BackendError where there is none."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    compiler = shutil.which("nvcc", path=path)
    if compiler is None:
        raise BackendError("nvcc is neither on PATH nor in $CUDA_HOME/bin: install the CUDA toolkit")
    return compiler


def cache_folder() -> Path:
    """Where libraries are kept; need not exist. Raises BackendError where the user has no home folder."""
    own = os.environ.get("SARQC_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser()
        return (Path(shared) if shared else Path.home() / ".cache") / "sarqc"
    except RuntimeError as error:  # HOME is not set, and the user is not in the passwd file
        raise BackendError(f"no home folder to keep libraries in: {error}; set SARQC_CACHE") from error


def arch_name(arch: int) -> str:
    """What nvcc calls a GPU of capability arch / 10: "90a" for 9.0, whose own instructions need the letter."""
    return "90a" if arch == 90 else str(arch)


def compile_library(name: str, arch: int, defines: tuple[str, ...] = ()) -> Path:
    """The shared library of csrc/<name>.cu for capability arch / 10, built now if the cache does not hold it.

    defines: macros, "NAME=value", which choose among what a source can be. Raises BackendError with the reason where it
    cannot be built.
    """
    compiler, folder, cache = nvcc(), sources(), cache_folder()
    source = folder / f"{name}.cu"
    if not source.exists():
        raise BackendError(f"there is no {source}")
    sm = arch_name(arch)
    flags = (*FLAGS, f"-gencode=arch=compute_{sm},code=sm_{sm}", *(f"-D{define}" for define in defines))
    try:
        target = cache / f"{name}-sm{sm}-{_key(compiler, folder, flags)}.so"
        if not target.exists():
            with _locked(target.with_suffix(".lock")):
                if not target.exists():  # another process may have made it meanwhile
                    LOG.warning("nvcc builds %s for sm_%s, once for this machine (seconds)", source.name, sm)
                    _build([compiler, *flags, str(source)], target)
    except OSError as error:
        raise BackendError(f"cannot build {source.name} in {cache}: {error}; set SARQC_CACHE") from error
    return target


def _key(compiler: str, folder: Path, flags: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, errors="replace").stdout
    key = hashlib.sha256("\n".join((version, *flags)).encode())
    for path in sorted(folder.glob("*.cu*")):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    return key.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that one process of the machine has at a time; the file goes when it is given back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # a process that waits for it finds the library, or builds it too


def _build(command: list[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, errors="replace")
        if done.returncode:
            message = " ".join((done.stderr.strip() or done.stdout.strip() or "no message").split())
            raise BackendError(f"nvcc failed for {target.stem}: {message[:400]}")
        made.replace(target)


@functools.cache
def library(name: str, arch: int, defines: tuple[str, ...] = ()) -> ctypes.CDLL:
    """csrc/<name>.cu as a loaded library, kept for the life of the process. Raises BackendError with the reason."""
    path = compile_library(name, arch, defines)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"{path} was built but does not load: {error}") from error


@functools.cache
def unsupported_reason(
    name: str, arch: int, device: torch.device | None = None, defines: tuple[str, ...] = ()
) -> str | None:
    """The reason why `library(name, arch, defines)` cannot run on `device`, None if it can.

    device: a CUDA device of capability arch / 10; None: the current one. The first call builds the library; its answer
    is remembered.
    """
    try:
        _check_ready(library(name, arch, defines), device)
    except BackendError as error:
        return str(error)
    return None


def _check_ready(made: ctypes.CDLL, device: torch.device | None) -> None:
    """Raise BackendError where the GPU cannot run what was loaded, as where nvcc is newer than the driver."""
    versions = (ctypes.c_int * 2)()
    with nullcontext() if device is None else torch.cuda.device(device):
        error = made.sarqc_ready(versions)
    if error:
        made.sarqc_error.restype = ctypes.c_char_p
        ours, theirs = (f"{version // 1000}.{version % 1000 // 10}" if version else "none" for version in versions)
        raise BackendError(
            f"kernels that nvcc built do not run: {made.sarqc_error(error).decode()} (CUDA {ours}, the driver takes up "
            f"to {theirs}); update the driver, or put an nvcc that it takes first on PATH"
        )

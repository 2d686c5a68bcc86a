"""What this machine and this installation have: memory, ranks, devices, versions, and a workaround for MKL.

glibc, control groups and torchrun are read here and nowhere else.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from sarqc._version import __version__
from sarqc.errors import ArgumentError

_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def host_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or less in a container or a job of a scheduler."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_limits()])


def _limits() -> Iterator[int]:
    """Bytes that control groups allow: that of this process and all around it, of version 2 or of version 1."""
    for line in _read(_OWN_GROUPS).splitlines():
        _, kinds, path = line.split(":", 2)
        version_1 = "memory" in kinds.split(",")
        if kinds and not version_1:
            continue
        root = _GROUPS / "memory" if version_1 else _GROUPS
        inmost = root / path.lstrip("/")
        for group in (inmost, *inmost.parents):
            if group.is_relative_to(root):
                content = _read(group / ("memory.limit_in_bytes" if version_1 else "memory.max")).strip()
                if content.isdigit():
                    yield int(content)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def ranks_here() -> int:
    """How many ranks of a run are on this machine, as torchrun says; 1 without it."""
    return from_torchrun("LOCAL_WORLD_SIZE", 1)


def from_torchrun(name: str, default: int) -> int:
    """A number that torchrun left in the environment."""
    value = os.environ.get(name, "")
    if not value:
        return default
    if not value.isdecimal() or int(value) < default:
        raise ArgumentError(f"{name} = {value!r} in the environment is no number from {default} up: torchrun sets it")
    return int(value)


def trim_host_memory() -> None:
    """Return freed memory to the system, where the C library supports it: glibc keeps tensors of some MB for later,
    and in pieces between what is still in use they are of little use to anyone."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


FUNCTIONS = (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt, torch.tanh, torch.erf)
"""What models and the method compute with, of those that go through the library."""


@functools.cache
def warm_up_mkl() -> None:
    """Call each of `FUNCTIONS` once in this process, on one element in fp32 and fp64."""
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for function in FUNCTIONS:
            function(one)


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """A device by name; "auto" is the first GPU where there is one. `ArgumentError` where it cannot be used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f"device = {device!r} is not known: use auto, cpu, cuda or cuda:N") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"device = {device!r}: this machine has {torch.cuda.device_count()} GPUs; use auto or cpu")
    if resolved.type not in {"cpu", "cuda"}:
        raise ArgumentError(f"device = {device!r} is not supported: use auto, cpu, cuda or cuda:N")
    return resolved


def resolve_dtype(dtype: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """A dtype by name; "auto" is what the checkpoint stores on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else stored
    if dtype not in _DTYPES:
        raise ArgumentError(f"dtype = {dtype!r} is not known: use auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def range_advice(dtype: torch.dtype) -> str:
    """What may help where numbers in this dtype are not finite."""
    if dtype == torch.float16:
        return "float16 ends at 65504: use --dtype bfloat16 or float32"
    return "look at the model, its dtype or the text"


FASTER = 1.5
"""How many times as fast as fp32 a CPU has to multiply bf16 to calibrate in it. Without instructions for bf16 it is
slower, with them 2.3 times as fast or more (`benchmarks/NOTES.md`): no noise of a measurement leads from one to the
other.
"""
_PROBE = (256, 512, 512)


def calibration_dtype(dtype: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """As `resolve_dtype`, but "auto" is bfloat16 on a CPU that is fast in it, for a checkpoint that stores it."""
    if dtype == "auto" and device.type == "cpu" and stored == torch.bfloat16 and multiplies_bf16():
        return torch.bfloat16
    return resolve_dtype(dtype, device, stored)


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 at least `FASTER` times as fast as fp32, measured in some 20 ms."""
    tokens, inputs, outputs = _PROBE
    least: dict[torch.dtype, float] = {}
    for attempt in range(6):
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = (torch.ones(rows, inputs, dtype=dtype, device="cpu") for rows in (tokens, outputs))
            began = time.perf_counter()
            torch.mm(x, weight.T)
            if attempt:  # the first one prepares the product
                least[dtype] = min(least.get(dtype, math.inf), time.perf_counter() - began)
    return least[torch.float32] >= FASTER * least[torch.bfloat16]


_PACKAGES = ("torch", "transformers", "safetensors", "triton")


def versions() -> dict[str, str]:
    """Versions of Python, of sarqc as it runs here, and of the packages a result depends on.

    Ours is not asked of what pip wrote down: of a checkout that is what it was when it was installed, or nothing.
    """
    return {"python": platform.python_version(), "sarqc": __version__} | installed(_PACKAGES)


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    found = {}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def peak_memory_mib() -> dict[str, int]:
    """Highest memory so far of this process on the host, and of the tensors on each GPU that was used."""
    peaks = {"host": _peak_of_host()}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if used := torch.cuda.max_memory_allocated(index):
            peaks[f"cuda:{index}"] = used // 2**20
    return peaks


def _peak_of_host() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) // 1024
    except (OSError, ValueError, IndexError):
        # Elsewhere than on Linux; there it would also count what the parent held before it started this process.
        unit = 1024 * 1024 if sys.platform == "darwin" else 1024
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit)

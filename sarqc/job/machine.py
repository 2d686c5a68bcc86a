"""What this machine has for this process."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from sarqc.errors import ArgumentError


def host_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or less in a container."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(found, int(text)) if text.isdigit() else found


def ranks_here() -> int:
    """How many ranks of a run are on this machine, as torchrun says; 1 without it."""
    return from_torchrun("LOCAL_WORLD_SIZE", 1)


def from_torchrun(name: str, default: int) -> int:
    """A number that torchrun left in the environment."""
    said = os.environ.get(name, "")
    if not said:
        return default
    if not said.isdecimal() or int(said) < default:
        raise ArgumentError(f"{name} = {said!r} in the environment is no number from {default} up: torchrun sets it")
    return int(said)


def give_back() -> None:
    """Return freed memory to the system, where the C library can be asked to: glibc keeps tensors of some MB for later,
    and in pieces between what is still in use they are of little use to anyone."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

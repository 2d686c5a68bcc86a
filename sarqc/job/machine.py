"""What this machine has for this process."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

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
                said = _read(group / ("memory.limit_in_bytes" if version_1 else "memory.max")).strip()
                if said.isdigit():
                    yield int(said)


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

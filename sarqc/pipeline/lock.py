"""A lock on a folder that ends with the process whatever becomes of it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from sarqc.errors import CheckpointError, ResourceError

LOCK = "lock"
"""Name of the file in the folder that is locked; the process id of its holder is in it."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a work folder, which is made if it is missing.

    Raises:
        CheckpointError: The folder holds files and no lock, so it is no work folder.
        ResourceError: Another process holds the lock, or the folder cannot be used.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists() and any(folder.iterdir()):
            raise CheckpointError(f"work folder {folder} holds other files: use an empty one, or one of a run")
        file = path.open("a+")
    except OSError as error:
        raise ResourceError(f"work folder {folder} cannot be used: {error.strerror or error}") from error
    with file:
        trouble = ""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _removed(path, file):
                trouble = "was just removed by another process: wait for it"
        except BlockingIOError:
            file.seek(0)
            trouble = f"is in use by process {file.read().strip() or '?'}: wait for it"
        except OSError as error:
            trouble = f"cannot be locked ({error.strerror or error}): use a file system with locks"
        if trouble:
            raise ResourceError(f"work folder {folder} {trouble}, or use another --work-dir")
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _removed(path: Path, file: TextIO) -> bool:
    """Whether an open file is no longer the one at `path`."""
    try:
        return not os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return True

"""A lock on a folder that ends with the process whatever becomes of it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino
        except OSError:
            gone = False
            file.seek(0)
            holder = file.read().strip() or "?"
        else:
            holder = ""
        if gone or holder:
            who = f"is in use by process {holder}" if holder else "was just removed by another process"
            raise ResourceError(f"work folder {folder} {who}: wait for it, or use another --work-dir")
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield

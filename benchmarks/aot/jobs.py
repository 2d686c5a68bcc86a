"""Every kernel that the operations can launch, as they list them themselves."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterator, Sequence

from sarqc_kernels.aot import AotJob

ROOMS = ("gram", "columns", "w4a16", "dequant")


def collect(rooms: Sequence[str] = (), match: str = "", archs: Sequence[int] = ()) -> list[AotJob]:
    """Jobs of `rooms`, for `archs` (empty: all) with `match` in the name. Raises ValueError if a name comes twice."""
    jobs = [job for job in _all(rooms or ROOMS) if match in job.name and (not archs or job.arch in archs)]
    twice = [key for key, count in Counter((job.name, job.arch) for job in jobs).items() if count > 1]
    if twice:
        raise ValueError(f"two jobs have one name: {twice}")
    return jobs


def _all(rooms: Sequence[str]) -> Iterator[AotJob]:
    for room in rooms:
        package = importlib.import_module(f"sarqc_kernels.{room}")
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.name.endswith("_impl") or ".triton." in found.name:
                yield from getattr(importlib.import_module(found.name), "aot_jobs", tuple)()

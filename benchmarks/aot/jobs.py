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
        for found in pkgutil.iter_modules(importlib.import_module(f"sarqc_kernels.{room}").__path__):
            if found.name.endswith("_impl"):
                module = importlib.import_module(f"sarqc_kernels.{room}.{found.name}")
                yield from getattr(module, "aot_jobs", tuple)()

"""Every kernel that the operations can launch, as they list them themselves."""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Iterator

from sarqc_kernels.targets import AotJob

ROOMS = ("gram", "columns", "w4a16")


def collect(match: str = "", archs: tuple[int, ...] = ()) -> list[AotJob]:
    """Jobs whose name contains `match`, for `archs` (empty: all). Raises ValueError where a name comes twice."""
    jobs = [job for job in _all() if match in job.name and (not archs or job.arch in archs)]
    twice = [key for key, count in Counter((job.name, job.arch) for job in jobs).items() if count > 1]
    if twice:
        raise ValueError(f"two jobs have one name: {twice}")
    return jobs


def _all() -> Iterator[AotJob]:
    for room in ROOMS:
        name = f"sarqc_kernels.{room}.triton_impl"
        if importlib.util.find_spec(name) is not None:
            yield from importlib.import_module(name).aot_jobs()

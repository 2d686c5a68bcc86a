"""Runs whose work folder stays after they are done, for tests that look into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sarqc
from sarqc.checkpoint.state import read_sealed
from sarqc.pipeline.resume import WorkFolder, default_work


@contextmanager
def kept() -> Iterator[None]:
    """WorkFolder folders are not removed."""
    with patch.object(WorkFolder, "remove", lambda _: None):
        yield


def quantize(*args: Any, **options: Any) -> sarqc.Result:
    """`sarqc.quantize`, its work folder kept."""
    with kept():
        return sarqc.quantize(*args, **options)


def opened(out: Path) -> WorkFolder:
    """The work folder of an output folder."""
    folder = default_work(out)
    return WorkFolder(folder, read_sealed(folder / "plan.json"))

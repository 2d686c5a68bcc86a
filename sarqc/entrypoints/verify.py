"""`sarqc.pipeline.verify` on a folder, beside the model that it was made of."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from sarqc.checkpoint.reader import open_checkpoint
from sarqc.errors import ArgumentError
from sarqc.model.hub import locate
from sarqc.pipeline.verify import Progress, Verified, check


def verify(
    folder: str | Path,
    *,
    against: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Verified:
    """Look at the checkpoint in `folder`; what is wrong with it is in the result, never an exception.

    against: the model it was made of (folder, hub id or `smollm2`). Raises `ArgumentError` where `folder` is none, and
    what opening `against` raises.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ArgumentError(f"checkpoint = {str(folder)!r} is not a folder: give one that `sarqc quantize` wrote")
    original = None if against is None else open_checkpoint(locate(against, trust_remote_code=trust_remote_code))
    with original or nullcontext() as source:
        return check(place, source, trust_remote_code=trust_remote_code, progress=progress)

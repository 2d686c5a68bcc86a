"""`sarqc.pipeline.verify` on a folder, beside the model that it was made of."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from sarqc.checkpoint.reader import open_checkpoint
from sarqc.model.hub import locate
from sarqc.options import with_alias
from sarqc.pipeline.verify import Progress, Verified, check


@with_alias(folder="checkpoint")
def verify(
    checkpoint: str | Path,
    *,
    against: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Verified:
    """Check a checkpoint: tensors against their checksums, names against the model, weights against the original.

    Args:
        checkpoint: Folder or hub id.
        against: The model it was made of: folder, hub id, or "smollm2". None: weights are not compared.
        trust_remote_code: Run Python code that comes with the models.
        progress: Called as progress(done, total, tensor).

    Returns:
        Whether it is sound, what is wrong with it, and which runtimes support it.

    Raises:
        SarqcError: `checkpoint` or `against` cannot be opened.
    """
    place = locate(checkpoint, trust_remote_code=trust_remote_code)
    original = None if against is None else open_checkpoint(locate(against, trust_remote_code=trust_remote_code))
    with original or nullcontext() as source:
        return check(place, source, trust_remote_code=trust_remote_code, progress=progress)

"""A finished checkpoint to a repository on a hub."""

from __future__ import annotations

from pathlib import Path

from sarqc.entrypoints.verify import verify
from sarqc.errors import ArgumentError, CheckpointError
from sarqc.model.hub import HUB_ID, upload
from sarqc.pipeline.verify import Progress


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> str:
    """Upload the checkpoint in `folder`, card and report included, after verifying it; the same call resumes.

    Args:
        folder: What `quantize` or `convert` wrote.
        repo: OWNER/NAME; made if it does not exist.
        private: Make the repository private. None: as the owner's settings have it. One that exists stays as it is.
        revision: Branch; made if it does not exist. None: the main branch.
        trust_remote_code: Upload the Python files of the model too, and run them to verify it.
        progress: Called as progress(done, total, tensor) while it is verified.

    Returns:
        The address of the commit.

    Raises:
        ArgumentError: `repo` is no OWNER/NAME, or `folder` no folder.
        CheckpointError: The folder is not a whole, sound checkpoint; nothing was uploaded.
        ModelError: The hub refused it, or cannot be reached.
    """
    if not HUB_ID.fullmatch(repo):
        raise ArgumentError(f"repo = {repo!r} is no repository: give OWNER/NAME, and a branch as revision")
    if not Path(folder).is_dir():
        raise ArgumentError(f"{str(folder)!r} is not a folder: give one that `sarqc quantize` or `convert` wrote")
    checked = verify(folder, trust_remote_code=trust_remote_code, progress=progress)
    if not checked.sound:
        raise CheckpointError(
            f"{checked.problems[0]}: nothing was uploaded; `sarqc verify {folder}` lists all problems"
        )
    if not checked.manifest:
        raise CheckpointError(
            f"{folder} has no manifest to verify it by: nothing was uploaded; give a folder that sarqc wrote"
        )
    return upload(Path(folder), repo, private=private, revision=revision, code=trust_remote_code)

"""From what a person calls a model to a folder with its files."""

from __future__ import annotations

import re
from pathlib import Path

from sarqc.errors import ModelError
from sarqc.model.packaged import SMOLLM2, smollm2_folder

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]


def locate(model: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Folder of a model: a local folder, the packaged `smollm2`, or a hub id, which is downloaded.

    A local folder wins over a hub id of the same name. Raises `ModelError` where there is neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(f"model {str(model)!r} is a file: give the folder that holds config.json and the weights")
    if str(model) == SMOLLM2:
        return smollm2_folder()
    if not _HUB_ID.fullmatch(str(model)):
        raise ModelError(f"no model {str(model)!r}: no such folder, and no hub id (OWNER/NAME) or 'smollm2' either")
    return _download(str(model), trust_remote_code)


def _download(hub_id: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = [*_NEEDED, "*.py"] if trust_remote_code else _NEEDED
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"no model {hub_id!r}: no such folder, and the hub did not give it ({reason})") from error

"""The files beside the weights that make a checkpoint usable: tokenizer, templates, generation settings, licence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sarqc.checkpoint.files import file_in, write_json
from sarqc.checkpoint.formats import FORMATS, Format
from sarqc.conventions import SIDE_FILES
from sarqc.errors import CheckpointError

WEIGHTS = frozenset(
    {".bin", ".ckpt", ".gguf", ".h5", ".index", ".msgpack", ".npz", ".onnx", ".pkl", ".pt", ".pth", ".safetensors"}
)


def side_files(source: Path, code: bool = False) -> tuple[str, ...]:
    """Names of the side files in `source`, sorted; its Python files, which run when it is loaded, only with `code`.

    `CheckpointError` for a link that leads out of the folder, and for a file that may not be read.
    """
    names: set[str] = set()
    for pattern in (*SIDE_FILES, "*.py") if code else SIDE_FILES:
        for path in source.glob(pattern):
            name = path.relative_to(source).as_posix()
            if path.is_dir() or path.suffix in WEIGHTS or name.endswith(".index.json"):
                continue
            if file_in(source, name) is not None:
                if not os.access(path, os.R_OK):
                    raise CheckpointError(f"{path} cannot be read: give yourself the right to, or move it away")
                names.add(name)
    return tuple(sorted(names))


def copy_side_files(source: Path | str, out: Path | str, code: bool = False) -> tuple[str, ...]:
    """Copies the side files of `source` into the folder `out`, contents only, and returns their names."""
    names = side_files(Path(source), code)
    for name in names:
        target = Path(out) / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(source) / name, target)
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error
    return names


def write_config(out: Path, config: Mapping[str, Any], format: Format, quantization: Mapping[str, Any]) -> None:
    """Write config.json of the folder `out`, and the files that readers of the format want beside it.

    Args:
        out: The folder.
        config: The model's configuration. What is in it under a key that any format has is dropped.
        format: The format of the weights.
        quantization: Its `quantization_config`.

    Raises:
        CheckpointError: A file cannot be written.
    """
    every = {key for known in FORMATS.values() for key in known.keys}
    plain = {key: value for key, value in config.items() if key not in every}
    write_json(out / "config.json", format.also(plain) | plain | dict.fromkeys(format.keys, quantization))
    for name, content in format.side_files(quantization).items():
        write_json(out / name, content)

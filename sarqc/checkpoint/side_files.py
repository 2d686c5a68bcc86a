"""The files beside the weights that make a checkpoint usable: tokenizer, templates, generation settings, licence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sarqc.checkpoint.files import file_in, write_json
from sarqc.checkpoint.formats import FORMATS, detect
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


def write_config(out: Path | str, config: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> Path:
    """Writes `config` as config.json of the folder `out`, with `quantization` as its quantization_config.

    None writes the config of an unquantized model. What was under that key, and under another that a format has, is
    dropped in both cases. Files that readers of the format want beside it are written too.
    """
    every = {key for known in FORMATS.values() for key in known.keys}
    merged = {key: value for key, value in config.items() if key not in every}
    path = Path(out) / "config.json"
    known = None if quantization is None else detect({"quantization_config": quantization})
    if quantization is not None:
        merged = (known.also(merged) if known else {}) | merged
        merged |= {key: dict(quantization) for key in (known.keys if known else ("quantization_config",))}
    write_json(path, merged)
    if known is not None and quantization is not None:
        for name, content in known.side_files(quantization).items():
            write_json(path.with_name(name), content)
    return path

"""A model that is in memory, as the checkpoint that transformers writes of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sarqc.errors import ArgumentError, ModelError, ResourceError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def is_name(model: Any) -> bool:
    """Whether a model is given by name or folder; `ArgumentError` for what is neither that nor a transformers model."""
    if isinstance(model, str | Path):
        return True
    if callable(getattr(model, "save_pretrained", None)) and hasattr(model, "config") and hasattr(model, "parameters"):
        return False
    raise ArgumentError(
        f"model is a {type(model).__name__}: give a folder, a hub id, 'smollm2' or a loaded transformers model"
    )


@contextmanager
def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, beside: Path) -> Iterator[Path]:
    """A checkpoint of the model, in a temporary folder in `beside`, for the time of the context.

    Raises:
        ModelError: transformers cannot save it, as is so where it is quantized already.
        ResourceError: The disk is full, or the folder cannot be written.
    """
    try:
        beside.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".model-in-memory-", dir=beside)
    except OSError as error:
        raise ResourceError(f"output folder {beside} cannot be used: {error.strerror or error}") from error
    with temporary as name:
        folder = Path(name) / _name(model)
        try:
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        except OSError as error:
            raise ResourceError(
                f"the model in memory cannot be saved in {beside}: {error.strerror or error}"
            ) from error
        except Exception as error:  # a model of one's own saves itself with code of one's own
            raise ModelError(f"transformers cannot save the model in memory: {first_line(error)}") from error
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise ModelError(
                f"{type(model).__name__} does not save a whole model: merge adapters first (`model.merge_and_unload()`)"
            )
        yield folder


def model_name(model: PreTrainedModel) -> str:
    """What a report calls it: where it was loaded from, or its class."""
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def _name(model: PreTrainedModel) -> str:
    return Path(model_name(model)).name or type(model).__name__

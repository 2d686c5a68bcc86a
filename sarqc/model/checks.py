"""Is a config.json one that a model may be built from? Asked before transformers sees it.

It comes from a stranger, and a model is built as large as it says: a number of layers with three noughts too many
would fill the memory before anything could be compared with the weights. The limits are far above every model there is
(2026: 512 experts, 126 layers, vocabularies of 262 144), and the number of layers is also held against the checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sarqc.errors import ModelError, first_line

LARGEST = 1 << 40
LARGEST_SIZE = 1 << 24
LARGEST_COUNT = 100_000
SHALLOW = 256
_SIZE = re.compile(r".*_(size|dim|rank)|d_model|n_(embd|inner|positions|ctx)")
_COUNT = re.compile(r"(num|n)_.*|.*_layers")


def check_config(folder: str | Path) -> dict[str, Any]:
    """config.json in `folder`; `ModelError` where it is no JSON object or holds a number that no model has."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"no usable configuration in {folder}: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise ModelError(f"no usable configuration in {folder}: it holds a JSON {type(config).__name__}")
    for key, value in _numbers(config):
        limit = LARGEST_SIZE if _SIZE.fullmatch(key) else LARGEST_COUNT if _COUNT.fullmatch(key) else LARGEST
        if abs(value) > limit:
            raise ModelError(f"{path} says {key} = {str(value)[:24]}, more than any model has ({limit}): it is damaged")
    return config


def check_layers(config: Any, tensors: int) -> None:
    """`ModelError` where a deep model would have more layers than its checkpoint has tensors.

    A shallow one is built quickly, and what it lacks is then said by name.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > max(tensors, SHALLOW):
        raise ModelError(f"the configuration asks for {layers} layers, and the checkpoint has {tensors} tensors in all")


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number of a JSON object, at any depth, with the nearest key above it."""
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += ((key, element) for element in value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, value

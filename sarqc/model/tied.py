"""A head that is tied to the embedding, taken apart from it where one of them is to be quantized.

As packed tensors they cannot stay one: transformers and vLLM tie a head by handing it the dense weight of the
embedding, which a packed one does not have. So the checkpoint gets a tensor for each, and a configuration that says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from sarqc.conventions import MatrixSlice
from sarqc.model.lazy_model import LazyModel
from sarqc.model.source import TensorSource

_KEY = "tie_word_embeddings"


def separate(lazy: LazyModel, source: TensorSource, wanted: Callable[[str], bool]) -> dict[str, MatrixSlice]:
    """The tensors, by name, that the source has to show in place of each one that two parameters outside the blocks
    share. wanted: whether a layer of this name is to be quantized; what shares its tensor with none such stays."""
    apart: dict[str, MatrixSlice] = {}
    for target, origin in lazy.model.all_tied_weights_keys.items():
        stored, missing = (target, origin) if target in lazy.slices else (origin, target)
        slices, inside = lazy.slices.get(stored, ()), target.startswith(f"{lazy.prefix}.")
        if inside or len(slices) != 1 or missing in lazy.slices:
            continue
        tensor = slices[0].name
        shape = source.shape(tensor)
        if len(shape) == 2 and any(wanted(name.removesuffix(".weight")) for name in (tensor, target, origin)):
            whole = MatrixSlice(tensor, None, 0, 1, (shape[0], shape[1]), transposed=False, row=0)
            apart |= {tensor: whole, missing: whole}
    return apart


def untied(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration, a copy, of a model whose head has a weight of its own."""
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    config.get_text_config(decoder=True).tie_word_embeddings = False
    return config


def untied_file(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same as config.json has it."""
    inner = {key: {**part, _KEY: False} for key, part in config.items() if isinstance(part, dict) and _KEY in part}
    return {**config, **inner, _KEY: False}

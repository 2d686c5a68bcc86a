"""A head that is tied to the embedding, taken apart from it where one of them is to be quantized.

As packed tensors they cannot stay one: transformers and vLLM tie a head by handing it the dense weight of the
embedding. So the checkpoint gets a tensor for each, and a configuration that says so.
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
    for pair in lazy.model.all_tied_weights_keys.items():
        stored = [parameter for parameter in pair if parameter in lazy.slices]
        if len(stored) != 1 or any(parameter.startswith(f"{lazy.prefix}.") for parameter in pair):
            continue
        slices = lazy.slices[stored[0]]
        (missing,) = set(pair) - set(stored)
        names = (slices[0].name, missing)
        shape = source.shape(slices[0].name)
        if (
            len(slices) != 1
            or len(shape) != 2
            or not any(wanted(name.removesuffix(".weight")) for name in (*pair, names[0]))
        ):
            continue
        whole = MatrixSlice(names[0], None, 0, 1, (shape[0], shape[1]), transposed=False, row=0)
        apart |= dict.fromkeys(names, whole)
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

"""A model of which only the configuration is here: names, shapes and dtypes of its tensors, and nothing to read.

transformers builds the model on the meta device and says under which names it would save it: the names of its
checkpoint, one tensor for each matrix of each expert. That is enough to plan a run.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from sarqc.conventions import SOURCE_METHODS
from sarqc.errors import ModelError
from sarqc.model.architecture import build_on_meta, language_model, read_config
from sarqc.model.source import HeaderSource


def header_source(folder: str | Path, *, trust_remote_code: bool = False) -> HeaderSource:
    """Headers of the model whose config.json is in `folder`; `ModelError` where that is not supported."""
    config = unquantized_decoder(folder, trust_remote_code=trust_remote_code)
    dtype = config.dtype or torch.float32
    model = build_on_meta(config, trust_remote_code, dtype)
    tied = model.all_tied_weights_keys
    saved = {name: tensor.to("meta") for name, tensor in model.state_dict().items() if name not in tied}
    reverted = revert_weight_conversion(model, saved)
    return HeaderSource.of(reverted)


def unquantized_decoder(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration in `folder`.

    Raises:
        ModelError: It is no text decoder, or its weights are quantized in a way that is not read.
    """
    config = read_config(folder, trust_remote_code)
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        if method not in SOURCE_METHODS:
            how = f", with quant_method {method!r}" if method else ""
            raise ModelError(f"{folder} is quantized already{how}, which is not read: give the original model")
    return language_model(config)

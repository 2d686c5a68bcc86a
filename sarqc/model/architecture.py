"""Which class of transformers a configuration stands for, and where its decoder blocks are. No table of names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from sarqc.errors import ModelError, first_line
from sarqc.model.checks import check_config
from sarqc.model.usage import Usage

_AUTO = ("AutoModelForCausalLM", "AutoModelForMultimodalLM", "AutoModelForImageTextToText")
"""Classes that build a language model from a configuration, text models first."""


def read_config(folder: str | Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration in a model's folder; `ModelError` where there is none that transformers knows.

    A model type that transformers does not know is read as the class that the configuration names, if transformers has
    that (Kimi-K2 is a DeepseekV3ForCausalLM), unless the folder's own code may run.
    """
    known = None if trust_remote_code else _named_class(check_config(folder))
    try:
        config: PreTrainedConfig
        if known is not None:
            config = known.config_class.from_pretrained(folder)
            config.model_type = known.config_class.model_type  # by which transformers finds its conversions
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers checks a config with whatever its fields happen to raise
        raise ModelError(f"no usable configuration in {folder}: {first_line(error)}") from error
    return config


def _named_class(config: Mapping[str, Any]) -> type[PreTrainedModel] | None:
    """The class of transformers that a configuration of an unknown type names; None for known types and classes."""
    kind, named = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str) or kind in CONFIG_MAPPING or not isinstance(named, list) or not named:
        return None
    cls = getattr(transformers, str(named[0]), None)
    return cls if isinstance(cls, type) and issubclass(cls, PreTrainedModel) else None


def language_model(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of our own of a language model's configuration, without the record of a quantizer.

    Raises:
        ModelError: it has an encoder, or its class generates no text.
    """
    config = copy.deepcopy(config)
    named = config.architectures or ["CausalLM"]
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ModelError(f"architectures = {str(named)[:80]!r} in the configuration is no list of names")
    known = getattr(transformers, named[0], None)
    if known is not None and not (hasattr(known, "can_generate") and known.can_generate()):
        raise ModelError(f"{named[0]} is not a language model; give one that generates text")
    if known is None and not any(word in named[0] for word in ("CausalLM", "LMHead", "ConditionalGeneration")):
        raise ModelError(f"{named[0]} is not a language model; give one that generates text")
    if config.is_encoder_decoder:
        raise ModelError(f"model type {config.model_type!r} has an encoder; use a decoder-only language model")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the source gives dense tensors all the same
    return config


def build_on_meta(config: PreTrainedConfig, trust_remote_code: bool, dtype: torch.dtype) -> Any:
    """The model in eval mode, parameters on meta, buffers as an ordinary model of this dtype has them."""
    config = copy.deepcopy(config)
    try:
        with init_empty_weights(include_buffers=False):
            model = _maker(config, trust_remote_code)(config, dtype=dtype)
    except ModelError:
        raise
    except Exception as error:  # sizes that do not go together end in any kind of error
        what = f"model type {config.model_type!r} is not a language model that can be built as configured"
        raise ModelError(f"{what}: {first_line(error)}") from error
    return model.eval()


def _maker(config: PreTrainedConfig, trust_remote_code: bool) -> Callable[..., Any]:
    """What builds a model from this configuration: the class that it names, or the automatic one that knows it."""
    remote = getattr(config, "auto_map", None) or {}
    for name in _AUTO:
        if trust_remote_code and name in remote:
            return _from_config(getattr(transformers, name), True)
    named = (config.architectures or [""])[0]
    if (known := getattr(transformers, named, None)) is not None and known.config_class is type(config):
        maker: Callable[..., Any] = known._from_config
        return maker
    for name in _AUTO:
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            return _from_config(auto, trust_remote_code)
    raise ModelError(f"model type {config.model_type!r} is not a language model; give one that generates text")


def _from_config(auto: Any, trust_remote_code: bool) -> Callable[..., Any]:
    return partial(auto.from_config, trust_remote_code=trust_remote_code)


def find_blocks(model: Any, usage: Callable[[], Usage | None]) -> tuple[str, nn.ModuleList]:
    """The decoder blocks: the outermost list of as many modules as the text configuration has layers.

    Where several or none are that long, as in a model with towers, it is the list that text passes through; of several
    the one with most parameters.

    Raises:
        ModelError: there is no such list.
    """
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and module]
    outermost = [one for one in lists if not any(one[0].startswith(f"{name}.") for name, _ in lists)]
    long = [one for one in outermost if len(one[1]) == count]
    if len(long) == 1:
        return long[0]
    seen = usage()
    passed = [one for one in outermost if seen is None or any(name.startswith(f"{one[0]}.") for name in seen.touched)]
    likely = [one for one in passed if len(one[1]) == count] or passed
    if not likely:
        raise ModelError(f"{type(model).__name__} has no list of decoder blocks that text passes through")
    return max(likely, key=lambda one: sum(parameter.numel() for parameter in one[1].parameters()))

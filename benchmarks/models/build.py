"""Builds the tiny models: a configuration with small sizes, weights that do something, saved as people save them."""

from __future__ import annotations

import copy
import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.models.rows import VARIANTS
from benchmarks.models.sizes import DERIVED, OWN, SIZES, VISION, VOCABULARY

LARGEST = 450e6
"""Parameters of a model that is not tiny: its configuration has a size that `sizes` does not know."""
_TOWER = r"vision|audio|vq|visual|tower|sam|codec|perceiver|qformer|speech|acoustic"
_TOKEN = re.compile(r"(token_id|token_index|_token|start_id|end_id|newline_id|patch_id)$")


def tiny_config(name: str, variant: dict[str, Any] | None = None) -> Any:
    """A small configuration of this model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[name], OWN.get(name, {}) | (variant or {}), SIZES)


def _shrunk(cls: Any, own: dict[str, Any], sizes: dict[str, Any]) -> Any:
    from transformers import PreTrainedConfig

    try:
        default = cls()
        present = {f.name: getattr(default, f.name, None) for f in dataclasses.fields(cls)}  # through its attribute_map
    except Exception:  # noqa: BLE001  # a configuration without its required fields fails in any way
        present = {f.name: f.default if f.default is not dataclasses.MISSING else None for f in dataclasses.fields(cls)}
    fields = {f.name for f in dataclasses.fields(cls)}
    chosen: dict[str, Any] = {}
    for key in fields:
        value = present.get(key)
        if isinstance(value, PreTrainedConfig):
            inner = {k.partition(".")[2]: v for k, v in own.items() if k.startswith(f"{key}.")}
            tower = sizes is VISION or re.search(_TOWER, key)
            chosen[key] = _shrunk(type(value), inner, VISION if tower else SIZES)
        elif key in DERIVED:
            continue
        elif key in sizes and isinstance(value, int | list | tuple) and not isinstance(value, bool):
            chosen[key] = sizes[key]
        elif _TOKEN.search(key) and isinstance(value, int) and value >= VOCABULARY:
            chosen[key] = VOCABULARY - 1 - len(key) % 32
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if key in fields:
            chosen[key] = 0
    if "head_dim" in fields and present.get("head_dim") is None and sizes is SIZES:
        chosen["head_dim"] = 32
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:  # MLA
        chosen["num_key_value_heads"] = 4
    chosen |= {k: v for k, v in own.items() if "." not in k}
    chosen = {k: v for k, v in chosen.items() if v is not ...}
    return cls(**chosen)


def model_class(row: str) -> Any:
    """The class of transformers that a row is built with."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if row.endswith("+vl"):
        name = auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[row.removesuffix("+vl")]
        return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


@cache
def tokenizer() -> Any:
    """A byte-level BPE of 512 tokens, trained on the built-in text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from sarqc.model.dataset import builtin_text

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<end>"], show_progress=False)
    bpe.train_from_iterator(builtin_text("evaluation").splitlines()[:500], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")


def build(row: str, folder: Path, **changes: Any) -> Any:
    """Save the tiny model of a row, without the row's condition, in bf16 with a tokenizer; the model.

    changes: fields of the configuration. Raises `ValueError` for a model that is not tiny.
    """
    import torch
    from transformers import AutoModelForCausalLM

    name = row.removesuffix("+vl").partition("@")[0]
    config = tiny_config(name, VARIANTS.get(row, {}) | changes)
    cls = model_class(row)
    if name in NEEDS_DECODER:
        config.is_decoder = True
    made_of = cls.from_config if cls is AutoModelForCausalLM else cls._from_config
    with torch.device("meta"):
        total = sum(p.numel() for p in made_of(copy.deepcopy(config), dtype=torch.float32).parameters())
    if total > LARGEST:
        raise ValueError(f"{row} is not tiny: {total / 1e6:.0f} million parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made_of(config, dtype=torch.float32).eval()
    fill(model)
    for parameter in model.parameters():  # not buffers: rotary tables stay fp32, as in a model that was loaded
        parameter.data = parameter.data.to(torch.bfloat16)
    if getattr(model, "generation_config", None) is not None:
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(model.generation_config, key, 0)
    model.save_pretrained(folder, max_shard_size="2MB" if row.endswith("@sharded") else "50GB")
    tokenizer().save_pretrained(folder)
    return model


NEEDS_DECODER = [
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
    "bart",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "marian",
    "mbart",
    "mvp",
    "pegasus",
    "plbart",
    "prophetnet",
    "reformer",
    "trocr",
    "whisper",
]  # encoders by default


def fill(model: Any) -> None:
    """Matrices that pass signals of unit size on, norms that are not all one: a lost or swapped tensor shows."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(1)

    def noise(t: Any, size: float) -> Any:
        return torch.randn(t.shape, generator=generator) * size

    with torch.no_grad():
        for module in model.modules():
            kind = type(module).__name__
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.numel() == 0:
                    continue
                if isinstance(module, nn.Embedding):
                    parameter.copy_(noise(parameter, 0.5))
                elif leaf == "weight" and (isinstance(module, nn.Linear) or kind == "Conv1D"):
                    fan = parameter.shape[0] if kind == "Conv1D" else parameter.shape[-1]
                    parameter.copy_(noise(parameter, 0.8 / fan**0.5))
                elif parameter.dim() == 3 and not kind.startswith("Conv"):
                    parameter.copy_(noise(parameter, 0.8 / max(parameter.shape[1:]) ** 0.5))
                elif parameter.dim() == 2 and leaf == "weight":
                    parameter.copy_(noise(parameter, 0.8 / parameter.shape[-1] ** 0.5))
                elif not re.search(r"A_log|dt_bias|^D$|A$|decay|first", leaf):
                    parameter.add_(noise(parameter, 0.05))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(noise(buffer, 0.02).to(buffer.dtype))

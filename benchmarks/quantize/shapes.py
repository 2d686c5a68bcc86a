"""Models by shape: a transformers configuration, and the names and shapes of the tensors of its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

Shapes = dict[str, tuple[int, ...]]

_SMALL = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096}  # fmt: skip

MODELS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "small": (LlamaConfig, {**_SMALL, "intermediate_size": 384}),
    "small-moe": (
        Qwen3MoeConfig,
        {**_SMALL, "intermediate_size": 256, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
         "norm_topk_prob": True},
    ),
    "smollm2-135m": (
        LlamaConfig,
        {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192},
    ),
    "moe-500m": (
        Qwen3MoeConfig,
        {"vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 512,
         "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
         "num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True, "max_position_embeddings": 4096},
    ),
    "llama-3-8b": (
        LlamaConfig,
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
         "rope_theta": 500000.0},
    ),
    "qwen3-30b-a3b": (
        Qwen3MoeConfig,
        {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
         "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
         "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 40960},
    ),
}  # fmt: skip


def config_of(model: str, blocks: int | None) -> PreTrainedConfig:
    """The configuration of a model of `MODELS`, with only the first `blocks` blocks where that is given."""
    kind, values = MODELS[model]
    layers = values["num_hidden_layers"]
    config = kind(**{**values, "num_hidden_layers": min(layers, blocks or layers)}, tie_word_embeddings=False)
    config.architectures = [f"{kind.__name__.removesuffix('Config')}ForCausalLM"]
    return config


def tensors_of(config: PreTrainedConfig) -> Shapes:
    """Shape of every tensor of the checkpoint, by the name it has there."""
    hidden, words = config.hidden_size, config.vocab_size
    shapes: Shapes = {"model.embed_tokens.weight": (words, hidden), "model.norm.weight": (hidden,),
                      "lm_head.weight": (words, hidden)}  # fmt: skip
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in _block(config)}
    return shapes


def _block(config: PreTrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    yield "input_layernorm", (hidden,)
    yield "post_attention_layernorm", (hidden,)
    yield "self_attn.q_proj", (queries, hidden)
    yield "self_attn.k_proj", (keys, hidden)
    yield "self_attn.v_proj", (keys, hidden)
    yield "self_attn.o_proj", (hidden, queries)
    if isinstance(config, LlamaConfig):
        yield from _mlp("mlp", hidden, config.intermediate_size)
        return
    yield "self_attn.q_norm", (head,)
    yield "self_attn.k_norm", (head,)
    yield "mlp.gate", (config.num_experts, hidden)
    for expert in range(config.num_experts):
        yield from _mlp(f"mlp.experts.{expert}", hidden, config.moe_intermediate_size)


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj", (inner, hidden)
    yield f"{prefix}.up_proj", (inner, hidden)
    yield f"{prefix}.down_proj", (hidden, inner)

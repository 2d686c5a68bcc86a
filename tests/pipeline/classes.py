"""Tiny random models of classes whose blocks differ in what they are called with, return and share."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TWO_KINDS: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA: dict[str, Any] = {
    "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
    "mamba_d_conv": 4, "mamba_expand": 1, "mamba_chunk_size": 8,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS | {"head_dim": 16}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2Config", dict(head_dim=16, **TWO_KINDS)),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),  # attention and MLP side by side
    "gptj": ("GPTJConfig", {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8}),
    "falcon_h1": ("FalconH1Config", MAMBA | {"head_dim": 16}),  # a hybrid
    "bamba": (
        "BambaConfig",
        {key: value for key, value in MAMBA.items() if key != "mamba_d_ssm"} | {"attn_layer_indices": [1]},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        EXPERTS
        | {
            "head_dim": 16, "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 3,
            "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "gemma3n": (  # embeddings of every layer's own, keys and values shared by layers, four streams at once
        "Gemma3nTextConfig",
        {
            "num_hidden_layers": 4, "head_dim": 16, "intermediate_size": [96] * 4, "num_kv_shared_layers": 2,
            "laurel_rank": 8, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            "num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 2, "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "num_global_key_value_heads": 2,
        },
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random model of a class, in eval mode."""
    kind, own = CONFIGS[name]
    config = getattr(transformers, kind)(**(BASE | own | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def blocks_of(model: Any) -> torch.nn.ModuleList:
    """The decoder blocks."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    return lists[0]


def windows(count: int = 3, size: int = 2, length: int = 12, seed: int = 1) -> list[Tensor]:
    """Micro-batches of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (size, length), generator=generator) for _ in range(count)]

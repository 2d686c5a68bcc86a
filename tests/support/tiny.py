"""Small random models with a working tokenizer, saved as ordinary checkpoints."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from sarqc.model.dataset import builtin_text

VOCABULARY = 512
_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=0,
)
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_COMMON),
    "mixtral": MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **_COMMON, head_dim=16, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True
    ),
    "deepseek_v3": DeepseekV3Config(
        **_COMMON | {"num_key_value_heads": 4},
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens, trained on the built-in text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<end>"], show_progress=False)
    bpe.train_from_iterator(builtin_text("evaluation").splitlines()[:500], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")


def save(kind: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Save a random model of a kind, with its tokenizer; the weights are drawn with `seed`."""
    config = type(CONFIGS[kind])(**CONFIGS[kind].to_dict() | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder

"""A mixture-of-experts model of any size with random weights, made shard by shard: no more than a block is in memory.

What is random is one stretch of numbers; every tensor is a piece of it, from a place that is drawn. That is as quick as
writing the file, and good enough for whoever looks at bytes and memory rather than at text.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

from tests.support import tiny

HEAD = 64
TILE = 128
SCALE = 2**-10


def save(
    folder: Path,
    *,
    blocks: int = 64,
    experts: int = 64,
    hidden: int = 1024,
    inner: int = 320,
    seed: int = 0,
    fp8: bool = False,
) -> Path:
    """A bf16 checkpoint of shape qwen3_moe with the tokenizer of the tiny models, a shard for each block.

    inner: width of an expert. The default is 64 blocks of 131 MB, 8.4 GB in all. fp8: matrices in float8_e4m3fn with a
    scale for each 128 x 128, half as large.
    """
    folder.mkdir(parents=True)
    heads = hidden // HEAD
    config = Qwen3MoeConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        moe_intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        head_dim=HEAD,
        num_experts=experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
    )
    if fp8:
        config.quantization_config = {"quant_method": "fp8", "weight_block_size": [TILE, TILE]}
    config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    drawn = _Drawn(2 * hidden * max(tiny.VOCABULARY, hidden), seed)
    outer = {"model.embed_tokens.weight": drawn.matrix(tiny.VOCABULARY, hidden), "model.norm.weight": ones(hidden)}
    names = _write(folder / "outer.safetensors", outer)
    for index in range(blocks):
        block = _block(drawn, index, experts, hidden, inner)
        names |= _write(folder / f"block-{index:03d}.safetensors", _in_fp8(block) if fp8 else block)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    promised = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(promised))
    return folder


def _block(drawn: _Drawn, index: int, experts: int, hidden: int, inner: int) -> dict[str, Tensor]:
    at, pairs = f"model.layers.{index}.", hidden // 4
    tensors = {
        f"{at}self_attn.q_proj.weight": drawn.matrix(hidden, hidden),
        f"{at}self_attn.k_proj.weight": drawn.matrix(pairs, hidden),
        f"{at}self_attn.v_proj.weight": drawn.matrix(pairs, hidden),
        f"{at}self_attn.o_proj.weight": drawn.matrix(hidden, hidden),
        f"{at}mlp.gate.weight": drawn.matrix(experts, hidden),
    }
    for name, width in (("input_layernorm", hidden), ("post_attention_layernorm", hidden)):
        tensors[f"{at}{name}.weight"] = ones(width)
    for name in ("q_norm", "k_norm"):
        tensors[f"{at}self_attn.{name}.weight"] = ones(HEAD)
    for expert in range(experts):
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            tensors[f"{at}mlp.experts.{expert}.{name}_proj.weight"] = drawn.matrix(*shape)
    return tensors


def _in_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The projections with `weight_scale_inv`, as DeepSeek and Qwen publish."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "proj" not in name:
            stored[name] = tensor
            continue
        stored[name] = (tensor.float() / SCALE).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = torch.full([-(-size // TILE) for size in tensor.shape], SCALE)
    return stored


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    save_file(tensors, path, metadata={"format": "pt"})
    return dict.fromkeys(tensors, path.name)


def ones(width: int) -> Tensor:
    return torch.ones(width, dtype=torch.bfloat16)


class _Drawn:
    """A stretch of random numbers bf16, to be cut into matrices."""

    def __init__(self, length: int, seed: int) -> None:
        self._source = torch.Generator().manual_seed(seed)
        self._numbers = (torch.randn(length, generator=self._source) * 0.02).bfloat16()

    def matrix(self, rows: int, columns: int) -> Tensor:
        first = int(torch.randint(len(self._numbers) - rows * columns + 1, (), generator=self._source))
        return self._numbers[first : first + rows * columns].view(rows, columns).clone()

"""Models to take a step with, the context they take it in, and the least work of a step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from benchmarks.ops.base import Call
from benchmarks.quantize.shapes import config_of, tensors_of
from benchmarks.quantize.source import RandomSource
from sarqc.config import QuantConfig
from sarqc.model.build import build
from sarqc.model.generate import cache_name
from sarqc.model.lazy_model import LazyModel
from sarqc.model.moe import is_experts
from sarqc_kernels.backend import ENVIRONMENT

GROUP = 128  # or the largest part of it that divides the inputs of a small shape


def made(shape: str, bits: int | None, device: torch.device) -> Any:
    """A transformers model in the shape of `shape` with bf16 activations and random weights, in eval mode.

    bits: of the packed linear layers of its blocks, in groups of 128; None: all weights bf16, experts by the grouped
    product of transformers. Embeddings, routers, norms and the head are bf16 in either.
    """
    config = config_of(shape, None)
    tensors = tensors_of(config)
    group = math.gcd(GROUP, *(shape[-1] for name, shape in tensors.items() if "_proj" in name))
    quant = None if bits is None else QuantConfig(bits=bits, group_size=group)
    source = RandomSource(tensors, device=device, quant=quant)
    model = build(
        LazyModel.from_config(config, source), source, device=device, dtype=torch.bfloat16, packed=bits is not None
    )
    if bits is None and any(is_experts(module) for module in model.modules()):
        model.set_experts_implementation("grouped_mm")  # ours asks the device for offsets where weights are dense
    return model


class Context:
    """The keys and values of a context that is full but for the token at hand, in the place of a transformers cache.

    Every step writes the last place and reads all of them, so a step can be repeated, in a CUDA graph too, and none
    has a mask. Keys and values are bf16 [layers, B, heads, length, head_dim], drawn once.
    """

    is_compileable = False  # transformers would make a mask for a static cache that can be half full

    def __init__(self, config: PreTrainedConfig, batch: int, length: int, device: torch.device) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
        generator = torch.Generator(device).manual_seed(batch)
        self.keys, self.values = (
            torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2)
        )
        self.length = length

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values [B, heads, 1, head_dim] of a layer; those of the whole context."""
        self.keys[layer, :, :, -1:].copy_(keys)
        self.values[layer, :, :, -1:].copy_(values)
        return self.keys[layer], self.values[layer]

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens before the one at hand."""
        return self.length - 1

    def get_query_offset(self, layer: int = 0) -> int:
        """The place of the token at hand."""
        return self.length - 1

    def get_mask_sizes(self, query_length: int, layer: int = 0) -> tuple[int, int]:
        """Keys that are there, and the place of the first."""
        return self.length, 0


def step(model: Any, context: Context) -> Call:
    """A call that gives the logits [B, 1, V] of one more token of each sequence."""
    batch, device = context.keys.shape[1], context.keys.device
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(model.config.vocab_size, (batch, 1), generator=generator).to(device)
    places = torch.full((batch, 1), context.length - 1, device=device)

    given = {cache_name(model): context}

    @torch.inference_mode()
    def call() -> Tensor:
        logits: Tensor = model(input_ids=ids, position_ids=places, use_cache=True, **given).logits
        return logits

    return call


@contextmanager
def by_reference() -> Iterator[None]:
    """Every operation of ours is its plain torch reference for the time of the context."""
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = "reference"
    try:
        yield
    finally:
        del os.environ[ENVIRONMENT]
        if before is not None:
            os.environ[ENVIRONMENT] = before


def bytes_of(model: Any, context: Context) -> float:
    """Bytes a step must read: every weight as it lies, of experts those that are hit, and the context.

    Of the embedding only the rows of the tokens. Experts hit are E (1 - (1 - k/E)^B), as if tokens chose k of E
    uniformly and apart.
    """
    batch = context.keys.shape[1]
    total = 2.0 * context.keys.numel() * context.keys.element_size()
    table = model.get_input_embeddings()
    for module, share in _with_shares(model, batch):
        if module is table:
            total += batch * table.weight[0].numel() * table.weight.element_size()
        else:
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            total += share * sum(tensor.numel() * tensor.element_size() for tensor in own)
    return total


def flops_of(config: PreTrainedConfig, batch: int, length: int) -> float:
    """Flops of a step: two for each weight a token meets, and its attention to the context."""
    met = 0.0
    for name, shape in tensors_of(config).items():
        if len(shape) == 2 and "embed_tokens" not in name:
            share = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1.0
            met += share * shape[0] * shape[1]
    attention = 2.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return 2.0 * batch * (met + attention)


def _with_shares(model: nn.Module, batch: int) -> Iterator[tuple[nn.Module, float]]:
    """Every module, with the share of it that a step of `batch` tokens reads."""
    shares: dict[nn.Module, float] = {}
    for module in model.modules():
        if is_experts(module):
            config: Any = model.config
            hit = 1.0 - (1.0 - config.num_experts_per_tok / config.num_experts) ** batch
            shares |= dict.fromkeys(module.modules(), hit)
        yield module, shares.get(module, 1.0)

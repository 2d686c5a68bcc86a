"""llm-compressor 0.14's GPTQ solver: one fused Triton launch for 128 columns, batched over experts.

`pip install llmcompressor==0.14.0.1` (it pins compressed-tensors 0.19 and transformers below 5.18: an environment of
its own). Its `quantize_weight` takes [B, N, K] weights and [B, K, K] Hessians as working memory, so each call gets
copies; it returns dequantized weights, from which the codes are read back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops.base import Call, Contender, Inputs, Point, installed


def unsupported(point: Point, device: torch.device) -> str | None:
    """Not installed, or without a card, where it runs its eager loop (which we time as such)."""
    if reason := installed("llmcompressor"):
        return reason
    return None if device.type == "cuda" else "its fused step needs an NVIDIA card"


def contender(group_size: int, bits: int) -> Contender:
    """Symmetric, in groups, activation order off, no damping beyond what the Hessian has."""

    def bind(inputs: Inputs) -> Call:
        from compressed_tensors.quantization import QuantizationArgs
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

        rule = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group_size,
                                actorder=None)  # fmt: skip
        scales = inputs["scales"].float()
        zeros = torch.zeros_like(scales)  # their codes are signed

        def call() -> Tensor:
            weight, hessian = inputs["weight"].clone(), inputs["hessian"].clone()
            result, *_ = quantize_weight(weight, hessian, scales, zeros, None, rule, percdamp=0.0)
            levels = result.unflatten(-1, (scales.shape[-1], -1)) / scales.unsqueeze(-1)
            return (levels.round() + (1 << (bits - 1))).flatten(-2).to(torch.uint8)

        return call

    return Contender("llm-compressor fused GPTQ", False, unsupported, bind)

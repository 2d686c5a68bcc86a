"""Packed experts of compressed-tensors in vLLM on `w4a16_experts`.

vLLM has no registry for kernels of experts. Its class for packed experts is replaced by one that takes its own place
again where a layer is not for these kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as place,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe import (
    CompressedTensorsMoEMethod,
)
from vllm.model_executor.utils import replace_parameter

from sarqc_kernels.vllm_plugin.linear import codes_of
from sarqc_kernels.vllm_plugin.linear import unsupported_reason as why_not_matrix
from sarqc_kernels.w4a16 import RepackedWeight, repack, route, w4a16_experts

logger = init_logger("vllm.sarqc")
_OWN = place.CompressedTensorsWNA16MoEMethod


def offer() -> None:
    """Let vLLM make `SarqcExperts` of packed experts."""
    place.CompressedTensorsWNA16MoEMethod = SarqcExperts


def unsupported_reason(weights: Any, moe: Any) -> str | None:
    """Why these kernels do not take a layer of experts; None where they do."""
    if moe.activation != MoEActivation.SILU or moe.swiglu_limit is not None:
        return f"the activation is {moe.activation}, not a plain silu gate"
    if moe.has_bias or moe.is_lora_enabled:
        return "experts have biases or adapters"
    if moe.moe_parallel_config.use_ep or moe.moe_parallel_config.dp_size > 1:
        return "experts or tokens are spread over ranks (expert or data parallelism)"
    if weights.actorder not in (None, "weight", "static"):
        return f"actorder is {weights.actorder}"
    group_size = -1 if weights.group_size is None else weights.group_size
    sides = (moe.hidden_dim, moe.intermediate_size_per_partition)
    reasons = (why_not_matrix(weights.num_bits, group_size, inputs, moe.in_dtype) for inputs in sides)
    return next((reason for reason in reasons if reason), None)


class SarqcExperts(_OWN):  # type: ignore[misc, valid-type]
    """A layer of experts: vLLM's parameters and loading, one operation of these kernels."""

    def __new__(cls, weight_quant: Any, input_quant: Any, moe: Any, layer_name: str | None = None) -> Any:
        """vLLM's own method where these kernels do not take the layer."""
        if reason := unsupported_reason(weight_quant, moe):
            logger.info_once("sarqc does not take experts: %s", reason)
            return _OWN(weight_quant, input_quant, moe, layer_name)
        logger.info_once("Using SarqcExperts for packed experts")
        return super().__new__(cls)

    def __init__(self, weight_quant: Any, input_quant: Any, moe: Any, layer_name: str | None = None) -> None:
        CompressedTensorsMoEMethod.__init__(self, moe)  # its own looks for a kernel of vLLM's
        self.weight_quant, self.input_quant = weight_quant, input_quant
        self.num_bits, self.symmetric, self.strategy = (
            weight_quant.num_bits,
            weight_quant.symmetric,
            weight_quant.strategy,
        )
        self.group_size = -1 if weight_quant.group_size is None else weight_quant.group_size
        self.packed_factor = place.Fraction(32, self.num_bits)
        self.is_transposed = self.is_marlin = False
        self.layouts: dict[str, tuple[Any, ...]] = {}

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Lay both matrices out for this device, once; the parameters keep their names."""
        if getattr(layer, "apply_router_weight_on_input", False):
            raise ValueError("sarqc does not run experts whose inputs are scaled by the router; unset SARQC_VLLM")
        for side, inputs in (("w13", self.moe.hidden_dim), ("w2", self.moe.intermediate_size_per_partition)):
            words, scales = getattr(layer, f"{side}_weight_packed"), getattr(layer, f"{side}_weight_scale")
            points = None
            if not self.symmetric:
                packed = getattr(layer, f"{side}_weight_zero_point").data.mT  # [E, G, words]
                points = codes_of(packed, self.num_bits, words.shape[1]).mT.contiguous()
                delattr(layer, f"{side}_weight_zero_point")
            codes = codes_of(words.data, self.num_bits, inputs)
            made = repack(codes, scales.data, points, bits=self.num_bits, dtype=self.moe.in_dtype, device=words.device)
            replace_parameter(layer, f"{side}_weight_packed", made.words)
            replace_parameter(layer, f"{side}_weight_scale", made.scales)
            layer.register_buffer(f"{side}_sarqc_zeros", made.zeros, persistent=False)
            self.layouts[side] = made[3:]

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """None: these kernels do not go through vLLM's modular ones."""

    def apply(
        self,
        layer: torch.nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """x [T, H] -> [T, H]: this rank's part of the sum; vLLM adds shared experts and other ranks."""
        gate_up, down = (self._weight(layer, side) for side in ("w13", "w2"))
        return w4a16_experts(x, gate_up, down, route(topk_ids.long(), topk_weights, gate_up.words.shape[0]))

    def _weight(self, layer: torch.nn.Module, side: str) -> RepackedWeight:
        tensors = (getattr(layer, f"{side}_{name}") for name in ("weight_packed", "weight_scale", "sarqc_zeros"))
        return RepackedWeight(*tensors, *self.layouts[side])

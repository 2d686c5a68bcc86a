"""Packed experts of compressed-tensors and GPTQ in vLLM on `w4a16_experts`.

vLLM has no registry for kernels of experts. Its classes for packed experts are replaced by classes that take their own
places again where a layer is not for these kernels.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization import auto_gptq
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as place,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe import (
    CompressedTensorsMoEMethod,
)
from vllm.model_executor.utils import replace_parameter

from sarqc_kernels.vllm_plugin.linear import codes_of
from sarqc_kernels.vllm_plugin.linear import unsupported_reason as unsupported_matrix
from sarqc_kernels.w4a16 import RepackedWeight, repack, route, w4a16_experts

logger = init_logger("vllm.sarqc")
_OWN = place.CompressedTensorsWNA16MoEMethod
_OWN_GPTQ = auto_gptq.AutoGPTQMoEMethod


def offer() -> None:
    """Let vLLM make `SarqcExperts` and `SarqcGPTQExperts` of packed experts."""
    place.CompressedTensorsWNA16MoEMethod = SarqcExperts
    auto_gptq.AutoGPTQMoEMethod = SarqcGPTQExperts


def unsupported_reason(bits: int, group_size: int, moe: Any) -> str | None:
    """Why these kernels do not take a layer of experts; None where they do. group_size -1: one group a row."""
    if moe.activation != MoEActivation.SILU or moe.swiglu_limit is not None:
        return f"the activation is {moe.activation}, not a plain silu gate"
    if moe.has_bias or moe.is_lora_enabled:
        return "experts have biases or adapters"
    if moe.moe_parallel_config.use_ep or moe.moe_parallel_config.dp_size > 1:
        return "experts or tokens are spread over ranks (expert or data parallelism)"
    sides = (moe.hidden_dim, moe.intermediate_size_per_partition)
    reasons = (unsupported_matrix(bits, group_size, inputs, moe.in_dtype) for inputs in sides)
    return next((reason for reason in reasons if reason), None)


def _taken(reason: str | None) -> bool:
    if reason:
        logger.info_once("sarqc does not take experts: %s", reason)
    else:
        logger.info_once("Using SarqcExperts for packed experts")
    return reason is None


class _Experts:
    """What both formats share: the weights in the layout of these kernels, and the product."""

    moe: Any
    words: str
    scales: str
    """Ends of the names of a matrix's parameters, which are kept."""

    def _keep(
        self, layer: torch.nn.Module, linear: str, codes: Tensor, scales: Tensor, points: Tensor | None, bits: int
    ) -> None:
        """Lay a matrix of all experts out for this device; codes [E, N, K], scales and points [E, N, G]."""
        made = repack(codes, scales, points, bits=bits, dtype=self.moe.in_dtype, device=codes.device)
        replace_parameter(layer, f"{linear}_{self.words}", made.words)
        replace_parameter(layer, f"{linear}_{self.scales}", made.scales)
        layer.register_buffer(f"{linear}_sarqc_zeros", made.zeros, persistent=False)
        self.layouts[linear] = made[3:]

    @cached_property
    def layouts(self) -> dict[str, tuple[Any, ...]]:
        """The layout of each matrix, without its tensors."""
        return {}

    def _sides(self, layer: torch.nn.Module) -> tuple[tuple[str, int], ...]:
        """The matrices and their numbers of inputs; `ValueError` for what is known only after loading."""
        if getattr(layer, "apply_router_weight_on_input", False):
            raise ValueError("sarqc does not run experts whose inputs are scaled by the router; unset SARQC_VLLM")
        if getattr(layer, "_loaded_expert_biases", None):
            raise ValueError("sarqc does not run experts with biases; unset SARQC_VLLM")
        return ("w13", self.moe.hidden_dim), ("w2", self.moe.intermediate_size_per_partition)

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
        gate_up, down = (self._weight(layer, linear) for linear in ("w13", "w2"))
        return w4a16_experts(x, gate_up, down, route(topk_ids.long(), topk_weights, gate_up.words.shape[0]))

    def _weight(self, layer: torch.nn.Module, linear: str) -> RepackedWeight:
        tensors = (getattr(layer, f"{linear}_{name}") for name in (self.words, self.scales, "sarqc_zeros"))
        return RepackedWeight(*tensors, *self.layouts[linear])


class SarqcExperts(_Experts, _OWN):  # type: ignore[misc, valid-type]
    """Experts of compressed-tensors: vLLM's parameters and loading, one operation of these kernels."""

    words, scales = "weight_packed", "weight_scale"

    def __new__(cls, weight_quant: Any, input_quant: Any, moe: Any, layer_name: str | None = None) -> Any:
        """vLLM's own method where these kernels do not take the layer."""
        group_size = -1 if weight_quant.group_size is None else weight_quant.group_size
        reason = unsupported_reason(weight_quant.num_bits, group_size, moe)
        if weight_quant.actorder not in (None, "weight", "static"):
            reason = f"actorder is {weight_quant.actorder}"
        return super().__new__(cls) if _taken(reason) else _OWN(weight_quant, input_quant, moe, layer_name)

    def __init__(self, weight_quant: Any, input_quant: Any, moe: Any, layer_name: str | None = None) -> None:
        CompressedTensorsMoEMethod.__init__(self, moe)  # its own looks for a kernel of vLLM's
        self.weight_quant, self.input_quant = weight_quant, input_quant
        self.num_bits, self.symmetric = weight_quant.num_bits, weight_quant.symmetric
        self.strategy = weight_quant.strategy
        self.group_size = -1 if weight_quant.group_size is None else weight_quant.group_size
        self.packed_factor = place.Fraction(32, self.num_bits)
        self.is_transposed = self.is_marlin = False

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Lay both matrices out for this device, once; the parameters keep their names."""
        for linear, inputs in self._sides(layer):
            words, scales = getattr(layer, f"{linear}_weight_packed"), getattr(layer, f"{linear}_weight_scale")
            points = None
            if not self.symmetric:
                packed = getattr(layer, f"{linear}_weight_zero_point").data.mT  # [E, G, words]
                points = codes_of(packed, self.num_bits, words.shape[1]).mT.contiguous()
                delattr(layer, f"{linear}_weight_zero_point")
            codes = codes_of(words.data, self.num_bits, inputs)
            self._keep(layer, linear, codes, scales.data, points, self.num_bits)


class SarqcGPTQExperts(_Experts, _OWN_GPTQ):  # type: ignore[misc, valid-type]
    """Experts of GPTQ, symmetric as all that vLLM loads; their stored zero-points say nothing."""

    words, scales = "qweight", "scales"

    def __new__(cls, quant_config: Any, moe: Any) -> Any:
        """vLLM's own method where these kernels do not take the layer."""
        reason = unsupported_reason(quant_config.weight_bits, quant_config.group_size, moe)
        return super().__new__(cls) if _taken(reason) else _OWN_GPTQ(quant_config, moe)

    def __init__(self, quant_config: Any, moe: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe)  # its own looks for a kernel of vLLM's
        self.quant_config, self.input_dtype = quant_config, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Lay both matrices out for this device, once; the parameters keep their names."""
        for linear, inputs in self._sides(layer):
            words, scales = (getattr(layer, f"{linear}_{name}").data for name in (self.words, self.scales))
            codes = codes_of(words.mT, self.quant_config.weight_bits, inputs)
            self._keep(layer, linear, codes, scales.mT.contiguous(), None, self.quant_config.weight_bits)
            for rest in ("qzeros", "bias"):
                delattr(layer, f"{linear}_{rest}")

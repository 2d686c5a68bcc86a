"""A packed Linear of vLLM on `w4a16_matmul`; tensor-parallel shards are Linears like any other here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS, register_linear_kernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import PlatformEnum, current_platform

from sarqc_kernels.packing import unpack
from sarqc_kernels.w4a16 import RepackedWeight, repack, w4a16_matmul
from sarqc_kernels.w4a16.config import takes_group
from sarqc_kernels.w4a16.matmul import ACTIVATION_DTYPES

logger = init_logger("vllm.sarqc")  # below vLLM's own logger, which is the one that is shown
_ZEROS = "sarqc_zeros"


def offer() -> None:
    """Put the kernel before vLLM's own, on CPUs and NVIDIA GPUs."""
    for platform in (PlatformEnum.CPU, PlatformEnum.CUDA):
        kernels = _POSSIBLE_KERNELS.setdefault(platform, [])
        if SarqcLinearKernel not in kernels:
            register_linear_kernel(SarqcLinearKernel, platform)
            kernels.insert(0, kernels.pop())


def unsupported_reason(bits: int, group_size: int, inputs: int, dtype: torch.dtype) -> str | None:
    """Why these kernels do not take a weight of this rank; None where they do. group_size -1: one group a row."""
    group_size = inputs if group_size == -1 else group_size
    if not 2 <= bits <= 8:
        return f"codes have {bits} bits, not 2 to 8"
    if dtype not in ACTIVATION_DTYPES:
        return f"activations are {dtype}, not bf16, fp16 or fp32"
    if group_size < 1 or inputs % group_size:
        return f"{inputs} inputs of this rank are no whole groups of {group_size}"
    if inputs * bits % 32:
        return f"{inputs} inputs of {bits} bits fill no whole words"
    if current_platform.is_cuda():
        if not current_platform.has_device_capability(80):
            return "the GPU is older than compute capability 8.0"
        if dtype == torch.float32 or not takes_group(group_size, inputs):
            return f"groups of {group_size} with activations of {dtype} fit no kernel for GPUs"
    return None


def codes_of(words: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [..., count] of int32 words [..., W]."""
    return unpack(words.contiguous(), bits, count)


class SarqcLinearKernel(MPLinearKernel):  # type: ignore[misc]
    """vLLM's interface of a mixed-precision Linear."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Not asked on a CPU; `can_implement` has the reason with words."""
        return 0

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether these kernels take the layer, or why not."""
        kind = c.weight_type
        reason = unsupported_reason(kind.size_bits, c.group_size, c.partition_weight_shape[0], c.act_type)
        if kind.is_floating_point() or kind.is_signed() or (kind.has_bias() and kind.bias != 1 << (kind.size_bits - 1)):
            reason = f"codes are {kind}, not unsigned integers about their middle"
        elif not (kind.has_bias() or c.zero_points):
            reason = f"codes are {kind} without zero points"
        if reason:
            logger.info_once("sarqc does not take a Linear %s: %s", c.partition_weight_shape, reason)
        return reason is None, reason

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Lay the weight out for this device, once; the parameters keep their names."""
        words, scales, zeros = self._get_weight_params(layer)
        bits, inputs = self.config.weight_type.size_bits, self.config.partition_weight_shape[0]
        rows_first = getattr(words, "output_dim", 0) == 0  # compressed-tensors; GPTQ has the inputs first
        codes = codes_of(words.data if rows_first else words.data.t(), bits, inputs)
        grid = scales.data if rows_first else scales.data.t()
        points = None
        if self.config.zero_points:
            packed = zeros.data.t() if rows_first else zeros.data  # [G, words]
            points = codes_of(packed, bits, codes.shape[0]).t().contiguous()[None]
        made = repack(
            codes[None],
            grid.contiguous()[None],
            points,
            bits=bits,
            dtype=self.config.act_type,
            device=words.device,
        )
        replace_parameter(layer, self.w_q_name, made.words)
        replace_parameter(layer, self.w_s_name, made.scales)
        layer.register_buffer(_ZEROS, made.zeros, persistent=False)
        if self.config.zero_points:
            delattr(layer, self.w_zp_name)
        self.layout: tuple[Any, ...] = made[3:]

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N]."""
        weight = RepackedWeight(
            getattr(layer, self.w_q_name), getattr(layer, self.w_s_name), getattr(layer, _ZEROS), *self.layout
        )
        out = w4a16_matmul(x.reshape(-1, x.shape[-1]), weight, None, None if bias is None else bias.unsqueeze(0))
        return out.reshape(*x.shape[:-1], weight.out_features)

"""MLX's affine quantization: what mlx-lm loads on Apple machines.

A Linear `P` with weight [N, K], b bits and groups of g inputs, G = K / g of them in a row, is

    P.weight  uint32 [N, K b / 32]  codes, a dense little-endian bit stream along each row
    P.scales  float [N, G]
    P.biases  float [N, G]          a weight is scale * code + bias

The matrices of all experts of a layer are one tensor [E, ...] under mlx-lm's names (`stacked`).

A bias stands for -zero * scale. For the middle code that is the scale times a power of two, exact in its own dtype.
Other zeros need more digits than bf16 or fp16 have, so asymmetric checkpoints have biases in fp32, and MLX then
computes in fp32. What is exact in neither is refused, as are files whose biases are no multiples of their scales: those
that mlx-lm quantizes are mostly such.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sarqc.checkpoint.formats.base import FormatDefaults, Info, Load, TensorInfo, Widths
from sarqc.checkpoint.formats.common import check_scale_dtype, check_tensor, check_weight, describe_tensor
from sarqc.checkpoint.formats.stacked import OWN_NAMES, own_names, stack_of
from sarqc.config import QuantConfig
from sarqc.errors import CheckpointError
from sarqc.method.weight import QuantizedWeight, WeightInfo
from sarqc_kernels.packing import pack, unpack

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
_SCALES = (torch.bfloat16, torch.float16, torch.float32)
_PARTS = ("weight", "scales", "biases")
_PART = re.compile(r"(?P<linear>.+)\.(?P<part>scales|biases)")


class Mlx(FormatDefaults):
    """Affine quantization of MLX. Stateless."""

    name = "mlx"
    keys = ("quantization", "quantization_config")
    stacked = True

    def detects(self, quantization: Mapping[str, Any]) -> bool:
        """True for the numbers that mlx-lm writes, which name no method; modes other than affine are refused later."""
        named = quantization.keys() & {"quant_method", "method"}
        return not named and {"bits", "group_size"} <= quantization.keys()

    def check(self, quant: QuantConfig) -> None:
        """The widths and group sizes that MLX has kernels for."""
        for bits in quant.bit_options or (quant.bits,):
            if bits not in BITS:
                raise CheckpointError(
                    f"bits = {bits} cannot be held by {self.name}: use 2, 3, 4, 5, 6 or 8, or format compressed-tensors"
                )
        if quant.group_size not in GROUPS:
            raise CheckpointError(
                f"group_size = {quant.group_size} cannot be held by {self.name}: use 32, 64 or 128, or format "
                "compressed-tensors"
            )

    def check_layer(self, linear: str, shape: tuple[int, int], quant: QuantConfig) -> None:
        """All but one that mlx-lm splits, and rounds again."""
        if linear.endswith(".kv_b_proj"):
            raise CheckpointError(
                f"{linear!r} cannot be held by {self.name} without loss: mlx-lm splits such layers and rounds them "
                "again; leave them with ignore = 'kv_b_proj$', or use format compressed-tensors"
            )

    def check_embedding(self, linear: str) -> None:
        """Any: mlx-lm takes an embedding for quantized where it finds scales."""

    def check_dense(self, name: str, shape: tuple[int, ...]) -> None:
        """Matrices and vectors alone: mlx-lm lays kernels of convolutions out in another order."""
        if len(shape) > 2:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(shape)}: {self.name} is written for models of matrices and vectors, "
                "without convolutions; use format compressed-tensors"
            )

    def pack(self, linear: str, weight: QuantizedWeight, quant: QuantConfig) -> dict[str, Tensor]:
        """The three tensors of `linear`, on the device of `weight`; `CheckpointError` for biases that are not exact."""
        self.check(quant)
        check_weight(linear, weight, quant)
        check_scale_dtype(linear, weight.scales.dtype, _SCALES, self.name)
        scales = weight.scales[0].contiguous()
        exact = -(weight.zeros[0].double() * scales.double())
        biases = exact.to(scales.dtype if quant.sym else torch.float32)
        if wrong := int((biases.double() != exact).sum()):
            raise CheckpointError(
                f"{linear!r} has {wrong} of {exact.numel()} groups whose zero times scale is no number of "
                f"{str(biases.dtype).removeprefix('torch.')}, which {self.name} stores: use format compressed-tensors"
            )
        words = pack(weight.codes[0], weight.bits).view(torch.uint32)
        return {f"{linear}.weight": words, f"{linear}.scales": scales, f"{linear}.biases": biases}

    def config(self, quant: QuantConfig, ignored: Sequence[str], widths: Widths = None) -> dict[str, Any]:
        """What mlx-lm writes. A layer of another width has numbers of its own; what has no scales is not quantized."""
        self.check(quant)
        config: dict[str, Any] = {"bits": quant.bits, "group_size": quant.group_size, "mode": "affine"}
        if names := own_names(widths or ()):
            config[OWN_NAMES] = names
        for linear, bits in (widths or {}).items():
            if bits != quant.bits:
                config[_path(linear)] = {"bits": bits, "group_size": quant.group_size}
        return config

    def also(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The older names of values that mlx-lm reads and that transformers 5 saves under others."""
        rope, experts = config.get("rope_parameters"), config.get("num_local_experts")
        extra = {} if experts is None else {"num_experts": experts}
        if isinstance(rope, dict) and "rope_theta" in rope:
            extra["rope_theta"] = rope["rope_theta"]
            if rope.get("rope_type", "default") != "default":
                extra["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        return extra

    def ignored(self, quantization: Mapping[str, Any]) -> tuple[str, ...]:
        """`lm_head`; what else has no scales is seen from the tensors."""
        return ("lm_head",)

    def linears(self, names: Iterable[str], quantization: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        """The quantized Linears and their tensors; refuses a set that is not whole."""
        _scheme(quantization, quantization)
        if (mode := quantization.get("mode", "affine")) != "affine":
            raise CheckpointError(f"MLX weights of mode {mode!r} are not read: only 'affine' is")
        every = set(names)
        linears = {match["linear"] for name in every if (match := _PART.fullmatch(name))}
        for linear in sorted(linears):
            if missing := [part for part in _PARTS if f"{linear}.{part}" not in every]:
                raise CheckpointError(
                    f"{linear!r} has no {' and no '.join(missing)}, where MLX has {', '.join(_PARTS)}"
                )
        return {linear: tuple(f"{linear}.{part}" for part in sorted(_PARTS)) for linear in sorted(linears)}

    def describe(self, linear: str, quantization: Mapping[str, Any], info: Info, load: Load) -> WeightInfo:
        """What `linear` holds, from the headers of its tensors. Its biases, not read here, say whether it is symmetric:
        it counts as asymmetric."""
        return _check(linear, quantization, {part: info(f"{linear}.{part}") for part in _PARTS})

    def unpack(self, linear: str, quantization: Mapping[str, Any], load: Load) -> QuantizedWeight:
        """Codes, scales and zeros of `linear`; E = 1. `CheckpointError` where a bias is no multiple of its scale."""
        tensors = {part: load(f"{linear}.{part}") for part in _PARTS}
        info = _check(linear, quantization, tensors)
        scales, biases = tensors["scales"].double(), tensors["biases"].double()
        middle = torch.tensor(1 << (info.bits - 1)).double()
        zeros = torch.where(scales == 0, middle, -(biases / scales).round()).nan_to_num(-1, -1, -1)
        good = (zeros >= 0) & (zeros < 1 << info.bits) & (-zeros * scales == biases)
        if wrong := int((~good).sum()):
            raise CheckpointError(
                f"{linear!r} has {wrong} of {good.numel()} groups whose bias is not minus an integer zero from 0 to "
                f"{(1 << info.bits) - 1} times the scale: such MLX files are not read without loss; start from the "
                "unquantized model"
            )
        codes = unpack(tensors["weight"].view(torch.int32), info.bits, info.shape[1])
        return QuantizedWeight(
            codes.unsqueeze(0), tensors["scales"].unsqueeze(0), zeros.to(torch.uint8).unsqueeze(0), info.bits
        )


def _path(linear: str) -> str:
    """The module of mlx-lm that a Linear is part of."""
    stack = stack_of(linear)
    return stack[0] if stack else linear


def _scheme(numbers: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[int, int]:
    """Bits and group size of a layer: its own numbers, or those of all."""
    bits, group_size = (numbers.get(key, base.get(key)) for key in ("bits", "group_size"))
    if type(bits) is not int or bits not in BITS or type(group_size) is not int or group_size not in GROUPS:
        raise CheckpointError(f"MLX weights with bits {bits!r}, group_size {group_size!r} are not read")
    return bits, group_size


def _check(linear: str, quantization: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> WeightInfo:
    """Compares the tensors of one Linear with each other and with the config; `CheckpointError` where they differ."""
    own = quantization.get(_path(linear))
    bits, group_size = _scheme(own if isinstance(own, dict) else {}, quantization)
    words, scales = tensors["weight"], tensors["scales"]
    if words.dtype != torch.uint32 or len(words.shape) != 2 or words.shape[1] * 32 % bits:
        raise CheckpointError(
            f"weight of {linear!r} is {describe_tensor(words)}, where uint32 [outputs, words] is expected"
        )
    rows, columns = words.shape[0], words.shape[1] * 32 // bits
    if 0 in words.shape or columns % group_size:
        raise CheckpointError(
            f"weight of {linear!r} stands for [{rows}, {columns}], which has no groups of {group_size} inputs"
        )
    groups = columns // group_size
    why = f"a weight [{rows}, {columns}] of {bits} bits and {groups} groups"
    for part in ("scales", "biases"):
        check_tensor(linear, part, tensors[part], (rows, groups), _SCALES, why)
    return WeightInfo((rows, columns), scales.dtype, bits, groups, sym=False)

"""AWQ in the layout `gemm` of AutoAWQ: 4 bits with a zero for each group; vLLM, SGLang and GPTQModel load it.

A Linear `P` with weight [N, K] and groups of g inputs, G = K / g of them in a row, is

    P.qweight  int32 [K, N / 8]   codes, eight outputs to a word
    P.qzeros   int32 [G, N / 8]   zeros, the same way
    P.scales   float [G, N]

Nibble i of a word, lowest first, holds output [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight: the order in which AutoAWQ's
kernel wants them. AWQ scales channels before it rounds, but that is folded into other weights and leaves no trace here.

Writers say `zero_point` false for symmetric weights and store the middle code 8 as the zero. Servers take the layout
with zeros only, so what is written here always says true; a reader loses nothing, as the zeros are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sarqc.checkpoint.formats.base import FormatDefaults, Info, Load, TensorInfo, Widths
from sarqc.checkpoint.formats.common import (
    check_scale_dtype,
    check_tensor,
    check_uniform_bits,
    check_weight,
    complete_linears,
    describe_tensor,
    group_size_of,
    strings,
    with_fused,
    without_fused,
)
from sarqc.config import QuantConfig
from sarqc.errors import CheckpointError
from sarqc.method.weight import QuantizedWeight, WeightInfo
from sarqc_kernels.packing import pack, unpack

BITS = 4
_LANES = 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output in each nibble
_BACK = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of each output
_PART = re.compile(r"(?P<linear>.+)\.(?P<part>qweight|qzeros|scales|g_idx)")
_PARTS = {"qweight", "qzeros", "scales"}
_SCALES = (torch.float16, torch.bfloat16)


class Awq(FormatDefaults):
    """The layout `gemm` of AWQ. Stateless."""

    name = "awq"

    def detects(self, quantization: Mapping[str, Any]) -> bool:
        """True for `quant_method` "awq", in whatever layout; others than gemm are refused on reading."""
        return quantization.get("quant_method") == self.name

    def check(self, quant: QuantConfig) -> None:
        """4 bits alone."""
        check_uniform_bits(quant, self.name)
        if quant.bits != BITS:
            raise CheckpointError(f"bits = {quant.bits} cannot be held by {self.name}: use 4, or another format")

    def check_layer(self, linear: str, shape: tuple[int, int], quant: QuantConfig) -> None:
        """Outputs must fill whole words."""
        if shape[0] % _LANES:
            raise CheckpointError(
                f"{linear!r} has {shape[0]} outputs, which do not fill words of {_LANES} in {self.name}: "
                "ignore that layer, or use format compressed-tensors"
            )

    def check_head(self, linear: str) -> None:
        """None: AutoAWQ quantizes layers of decoder blocks alone, and its config has no key for a head."""
        raise CheckpointError(
            f"{linear!r} cannot be held by {self.name}, which quantizes layers of decoder blocks alone: leave it out "
            "of include, or use format compressed-tensors"
        )

    def pack(self, linear: str, weight: QuantizedWeight, quant: QuantConfig) -> dict[str, Tensor]:
        """The three tensors of `linear`, on the device of `weight`; scales in fp16 or bf16, as they come."""
        self.check(quant)
        check_weight(linear, weight, quant)
        check_scale_dtype(linear, weight.scales.dtype, _SCALES, self.name)
        rows, columns = weight.codes.shape[1:]
        self.check_layer(linear, (rows, columns), quant)
        return {
            f"{linear}.qweight": _pack(weight.codes[0].T),
            f"{linear}.qzeros": _pack(weight.zeros[0].T),
            f"{linear}.scales": weight.scales[0].T.contiguous(),
        }

    def config(self, quant: QuantConfig, ignored: Sequence[str], widths: Widths = None) -> dict[str, Any]:
        """The `quantization_config` that AutoAWQ writes. Readers match `modules_to_not_convert` as parts of names."""
        self.check(quant)
        return {
            "bits": BITS,
            "group_size": quant.group_size,
            "modules_to_not_convert": with_fused(ignored) or None,
            "quant_method": self.name,
            "version": "gemm",
            "zero_point": True,
        }

    def ignored(self, quantization: Mapping[str, Any]) -> tuple[str, ...]:
        """`modules_to_not_convert`, and `lm_head`, which AWQ never takes."""
        return (*without_fused(strings(quantization, "modules_to_not_convert")), "lm_head")

    def linears(self, names: Iterable[str], quantization: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        """The quantized Linears and their tensors, sorted; refuses a set that is not whole."""
        _numbers(quantization)
        return complete_linears(_PART, names, lambda _: _PARTS, "AWQ has")

    def describe(self, linear: str, quantization: Mapping[str, Any], info: Info, load: Load) -> WeightInfo:
        """What `linear` holds, from the headers of its tensors."""
        return _check(linear, quantization, {part: info(f"{linear}.{part}") for part in _PARTS})

    def unpack(self, linear: str, quantization: Mapping[str, Any], load: Load) -> QuantizedWeight:
        """Codes, scales and zeros of `linear`; E = 1."""
        tensors = {part: load(f"{linear}.{part}") for part in _PARTS}
        info = _check(linear, quantization, tensors)
        codes, zeros = (_unpack(tensors[part], info.shape[0]) for part in ("qweight", "qzeros"))
        if info.sym and not bool((zeros == 1 << (BITS - 1)).all()):
            raise CheckpointError(f"{linear!r} has zeros off the middle code 8, where its config says no zero_point")
        return QuantizedWeight(
            codes.unsqueeze(0), tensors["scales"].T.contiguous().unsqueeze(0), zeros.unsqueeze(0), BITS
        )


def _pack(table: Tensor) -> Tensor:
    """uint8 [*, N] -> int32 [*, N / 8], outputs in the order of the kernel."""
    return pack(table.unflatten(-1, (-1, _LANES))[..., _ORDER].flatten(-2), BITS)


def _unpack(words: Tensor, rows: int) -> Tensor:
    """int32 [*, N / 8] -> uint8 [N, *]."""
    table: Tensor = unpack(words, BITS, rows).unflatten(-1, (-1, _LANES))[..., _BACK].flatten(-2)
    return table.T.contiguous()


def _numbers(quantization: Mapping[str, Any]) -> tuple[int, bool]:
    """Group size and whether there are zero points; refuses a config that is not understood here."""
    version = quantization.get("version") or quantization.get("checkpoint_format") or quantization.get("format")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise CheckpointError(f"AWQ version {version!r} is not read: only 'gemm' is")
    bits = quantization.get("bits", quantization.get("w_bit"))
    group_size = quantization.get("group_size", quantization.get("q_group_size"))
    zero_point = quantization.get("zero_point", True)
    if type(bits) is not int or bits != BITS or type(zero_point) is not bool:
        raise CheckpointError(f"AWQ weights with bits {bits!r}, zero_point {zero_point!r} are not read: bits 4 is")
    return group_size_of(group_size), zero_point


def _check(linear: str, quantization: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> WeightInfo:
    """Compares the tensors of one Linear with each other and with the config; `CheckpointError` where they differ."""
    group_size, zero_point = _numbers(quantization)
    words = tensors["qweight"]
    if words.dtype != torch.int32 or len(words.shape) != 2 or 0 in words.shape:
        raise CheckpointError(
            f"qweight of {linear!r} is {describe_tensor(words)}, where int32 [inputs, outputs / 8] is expected"
        )
    columns, rows = words.shape[0], words.shape[1] * _LANES
    groups = 1 if group_size == -1 else columns // group_size
    if group_size != -1 and columns % group_size:
        raise CheckpointError(f"qweight of {linear!r} has {columns} inputs, which are no groups of {group_size}")
    why = f"a weight [{rows}, {columns}] with {groups} groups"
    check_tensor(linear, "qzeros", tensors["qzeros"], (groups, rows // _LANES), (torch.int32,), why)
    check_tensor(linear, "scales", tensors["scales"], (groups, rows), (*_SCALES, torch.float32), why)
    return WeightInfo((rows, columns), tensors["scales"].dtype, BITS, groups, not zero_point)

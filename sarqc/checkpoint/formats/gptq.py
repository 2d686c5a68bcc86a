"""GPTQ, version 1 and 2: what GPTQModel, vLLM, SGLang and transformers (through GPTQModel) load.

A Linear `P` with weight [N, K], b bits and groups of g inputs, G = K / g of them in a row, is

    P.qweight  int32 [K b / 32, N]   codes, a dense little-endian bit stream down each column (along the inputs)
    P.qzeros   int32 [G, N b / 32]   zeros, a bit stream along each row
    P.scales   float [G, N]
    P.g_idx    int32 [K]             group of each input; k // g here, because order on disk is the model's own

b is 2, 3, 4 or 8; 32 codes of 3 bits fill 3 words. Words are always full, so K b and N b must be multiples of 32.

Version 1 stores zero - 1 (the middle code 8 of 4 bits as 7, words of 0x77777777); version 2 stores the zero itself. In
version 1 the greatest stored number could mean 2^b or 0, and tools differ, so zeros off the middle are written as
version 2 only, and that number is refused when read. The row `gptq` of the table writes version 1 where weights are
symmetric, for servers read little else, and version 2 where not; `gptq_v2` always writes version 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    outside_blocks,
    with_fused,
    without_fused,
)
from sarqc.checkpoint.formats.gptq_config import (
    BITS,
    V1,
    V2,
    Scheme,
    check_config,
    exactly,
    left_out,
    method_of,
    scheme_of,
    version_of,
)
from sarqc.config import QuantConfig
from sarqc.errors import CheckpointError
from sarqc.method.weight import QuantizedWeight, WeightInfo
from sarqc_kernels.packing import pack, unpack

METHOD = "gptq"
CONFIG_FILE = "quantize_config.json"
_PART = re.compile(r"(?P<linear>.+)\.(?P<part>qweight|qzeros|scales|g_idx)")
_PARTS = {"qweight", "qzeros", "scales", "g_idx"}
_SCALES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Gptq(FormatDefaults):
    """One row of the table. name: "gptq" or "gptq_v2", which is also the version that it detects."""

    name: str

    def detects(self, quantization: Mapping[str, Any]) -> bool:
        """True for `quant_method` "gptq" in this version; v1 also takes other layouts, to refuse them on reading."""
        return method_of(quantization) == METHOD and (version_of(quantization) == V2) == (self.name == V2)

    def check(self, quant: QuantConfig) -> None:
        """2, 3, 4 and 8 bits have words that come out even."""
        check_uniform_bits(quant, self.name)
        if quant.bits not in BITS:
            raise CheckpointError(
                f"bits = {quant.bits} cannot be held by {self.name}: use 2, 3, 4 or 8, or format compressed-tensors"
            )

    def check_layer(self, linear: str, shape: tuple[int, int], quant: QuantConfig) -> None:
        """Both sides of the weight must fill whole words."""
        for size, what in zip(shape, ("outputs", "inputs")):
            if size * quant.bits % 32:
                raise CheckpointError(
                    f"{linear!r} has {size} {what}, which do not fill words of {quant.bits} bits in {self.name}: "
                    "ignore that layer, or use format compressed-tensors"
                )

    def pack(self, linear: str, weight: QuantizedWeight, quant: QuantConfig) -> dict[str, Tensor]:
        """The four tensors of `linear`, on the device of `weight`; scales in fp16 or bf16, as they come."""
        self.check(quant)
        check_weight(linear, weight, quant)
        check_scale_dtype(linear, weight.scales.dtype, _SCALES, self.name)
        rows, columns = weight.codes.shape[1:]
        self.check_layer(linear, (rows, columns), quant)
        zeros = weight.zeros[0].T.contiguous()  # [G, N]
        index = torch.arange(columns, dtype=torch.int32, device=zeros.device)
        return {
            f"{linear}.qweight": pack(weight.codes[0], weight.bits).T.contiguous(),
            f"{linear}.qzeros": pack(zeros if self._v2(quant) else zeros - 1, weight.bits),
            f"{linear}.scales": weight.scales[0].T.contiguous(),
            f"{linear}.g_idx": index // weight.group_size,
        }

    def _v2(self, quant: QuantConfig) -> bool:
        return self.name == V2 or not quant.sym

    def config(self, quant: QuantConfig, ignored: Sequence[str], widths: Widths = None) -> dict[str, Any]:
        """The `quantization_config` that GPTQModel writes; old and new names of two of its keys."""
        self.check(quant)
        version = V2 if self._v2(quant) else V1
        config: dict[str, Any] = {
            "bits": quant.bits,
            "checkpoint_format": version,
            "desc_act": False,  # whatever order the solver used, the columns on disk are in their own
            "format": version,
            "group_size": quant.group_size,
            "lm_head": bool(outside_blocks(widths or ())),  # a head is one to vLLM and SGLang, whatever its name
            "meta": {"quantizer": ["sarqc"]},
            "method": METHOD,
            "pack_dtype": "int32",
            "quant_method": METHOD,
            "sym": quant.sym,
        }
        if names := [name for name in with_fused(ignored) if name != "lm_head"]:
            config["dynamic"] = {f"-:{exactly(name)}": {} for name in names}
        return config

    def ignored(self, quantization: Mapping[str, Any]) -> tuple[str, ...]:
        """Names under `dynamic` that stand for one layer, and `lm_head`."""
        return tuple(without_fused(left_out(quantization)))

    def side_files(self, quantization: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """GPTQModel looks for the same numbers in a file of their own first."""
        return {CONFIG_FILE: quantization}

    def linears(self, names: Iterable[str], quantization: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        """The quantized Linears and their tensors, sorted; refuses a set that is not whole."""
        check_config(quantization)

        def parts(linear: str) -> set[str]:
            scheme_of(linear, quantization)  # a layer that its config leaves out is refused
            return _PARTS

        return complete_linears(_PART, names, parts, "GPTQ has")

    def describe(self, linear: str, quantization: Mapping[str, Any], info: Info, load: Load) -> WeightInfo:
        """What `linear` holds, from the headers of its tensors and the numbers of g_idx."""
        scheme = scheme_of(linear, quantization)
        infos = {part: info(f"{linear}.{part}") for part in _PARTS - {"g_idx"}}
        return _check(linear, scheme, infos, load(f"{linear}.g_idx"))

    def unpack(self, linear: str, quantization: Mapping[str, Any], load: Load) -> QuantizedWeight:
        """Codes, scales and zeros of `linear`; E = 1."""
        scheme = scheme_of(linear, quantization)
        tensors = {part: load(f"{linear}.{part}") for part in _PARTS}
        rows, columns = _check(linear, scheme, tensors, tensors["g_idx"]).shape
        codes = unpack(tensors["qweight"].T.contiguous(), scheme.bits, columns)
        zeros = unpack(tensors["qzeros"], scheme.bits, rows).T.contiguous()
        scales = tensors["scales"].T.contiguous()
        return QuantizedWeight(
            codes.unsqueeze(0), scales.unsqueeze(0), _meaning(linear, zeros, scheme).unsqueeze(0), scheme.bits
        )


def _check(linear: str, scheme: Scheme, tensors: Mapping[str, TensorInfo], index: Tensor) -> WeightInfo:
    """Compares the tensors of one Linear with each other and with its scheme; `CheckpointError` where they differ."""
    words = tensors["qweight"]
    if words.dtype != torch.int32 or len(words.shape) != 2 or 0 in words.shape or words.shape[0] * 32 % scheme.bits:
        raise CheckpointError(
            f"qweight of {linear!r} is {describe_tensor(words)}, where int32 [words of {scheme.bits} bits, outputs] is "
            "expected"
        )
    rows, columns = words.shape[1], words.shape[0] * 32 // scheme.bits
    group_size = columns if scheme.group_size == -1 else scheme.group_size
    if columns % group_size or rows * scheme.bits % 32:
        raise CheckpointError(
            f"qweight of {linear!r} stands for [{rows}, {columns}], which has no groups of {group_size} inputs or does "
            f"not fill words of {scheme.bits} bits"
        )
    groups = columns // group_size
    why = f"a weight [{rows}, {columns}] of {scheme.bits} bits and {groups} groups"
    check_tensor(linear, "qzeros", tensors["qzeros"], (groups, rows * scheme.bits // 32), (torch.int32,), why)
    check_tensor(linear, "scales", tensors["scales"], (groups, rows), (*_SCALES, torch.float32), why)
    _check_order(linear, index, columns, groups)
    return WeightInfo((rows, columns), tensors["scales"].dtype, scheme.bits, groups, scheme.sym)


def _check_order(linear: str, index: Tensor, columns: int, groups: int) -> None:
    """Refuses a g_idx that is not k // group_size: act-order groups are scattered over the inputs."""
    check_tensor(linear, "g_idx", index, (columns,), (torch.int32, torch.int64), f"a weight of {columns} inputs")
    if not torch.equal(index.long(), torch.arange(columns) // (columns // groups)):
        raise CheckpointError(
            f"{linear!r} has act-order groups (desc_act, a g_idx that is not k // group_size), which are not read: "
            "quantize it again without desc_act or with static groups"
        )


def _meaning(linear: str, stored: Tensor, scheme: Scheme) -> Tensor:
    """The zeros that the stored numbers (uint8 [N, G]) stand for."""
    greatest, middle = (1 << scheme.bits) - 1, 1 << (scheme.bits - 1)
    if not scheme.v2 and bool((stored == greatest).any()):
        raise CheckpointError(
            f"{linear!r} stores a zero as {greatest}, which in GPTQ version 1 may mean {greatest + 1} or 0: "
            "such files are not read; write it again as gptq_v2"
        )
    zeros = stored if scheme.v2 else stored + 1
    if scheme.sym and not bool((zeros == middle).all()):
        raise CheckpointError(f"{linear!r} has zeros off the middle code {middle}, where its config says sym")
    return zeros

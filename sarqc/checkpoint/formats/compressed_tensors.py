"""compressed-tensors `pack-quantized`: what vLLM, SGLang and transformers load.

A Linear `P` with weight [N, K], b bits and G groups in a row is

    P.weight_packed      int32 [N, ceil(K b / 32)]   codes, a dense little-endian bit stream along each row
    P.weight_scale       float [N, G]
    P.weight_shape       int64 [2] = (N, K)
    P.weight_zero_point  int32 [ceil(N b / 32), G]   zeros, a bit stream along each column; asymmetric only

The format speaks of signed codes v and stores v + 2^(b-1). Ours are unsigned with an integer zero, so what is stored
are our codes and our zeros as they are.

Versions of the compressed-tensors package before 0.18 padded each word (ten 3-bit codes, six of 5 bits) instead of
letting codes cross words. Mostly the shape says so, and where it does not the version does; both are read, the dense
one is written.
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
    check_weight,
    complete_linears,
    describe_tensor,
    outside_blocks,
    strings,
)
from sarqc.checkpoint.formats.compressed_tensors_config import (
    LAYOUT,
    Scheme,
    check_config,
    is_padded,
    scheme_of,
    targets_by_width,
)
from sarqc.config import QuantConfig
from sarqc.errors import CheckpointError
from sarqc.method.weight import QuantizedWeight, WeightInfo
from sarqc_kernels.packing import pack, unpack, unpack_padded

VERSION = "0.20.0"
"""Version of compressed-tensors whose layout is written; anything from 0.18 on reads it."""

_SCALES = (torch.bfloat16, torch.float16, torch.float32)
_PART = re.compile(r"(?P<linear>.+)\.(?P<part>weight_(?:packed|scale|shape|zero_point|g_idx))")


class CompressedTensors(FormatDefaults):
    """The format `pack-quantized` of compressed-tensors. Stateless."""

    name = "compressed-tensors"

    def detects(self, quantization: Mapping[str, Any]) -> bool:
        """True for `quant_method` "compressed-tensors", in whatever layout; other layouts are refused on reading."""
        return quantization.get("quant_method") == self.name

    def check(self, quant: QuantConfig) -> None:
        """Everything that a `QuantConfig` can say from 2 to 8 bits can be held."""
        if not 2 <= quant.bits <= 8:
            raise CheckpointError(f"bits = {quant.bits} cannot be held by {self.name} {LAYOUT}: use 2 to 8")

    def check_embedding(self, linear: str) -> None:
        """Any: vLLM takes an embedding for quantized where a target is its name."""

    def pack(self, linear: str, weight: QuantizedWeight, quant: QuantConfig) -> dict[str, Tensor]:
        """The three (symmetric) or four tensors of `linear`, on the device of `weight`; the shape on the CPU.

        `quant` is needed because the files must agree with one config: a weight whose zeros happen to be in the
        middle still stores them when `quant` is asymmetric. `NumericError` for scales that are not finite.
        """
        check_weight(linear, weight, quant)
        check_scale_dtype(linear, weight.scales.dtype, _SCALES, self.name)
        rows, columns = weight.codes.shape[1:]
        tensors = {
            f"{linear}.weight_packed": pack(weight.codes[0], weight.bits),
            f"{linear}.weight_scale": weight.scales[0].contiguous(),
            f"{linear}.weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
        }
        if not quant.sym:
            packed = pack(weight.zeros[0].T.contiguous(), weight.bits)  # [G, words]
            tensors[f"{linear}.weight_zero_point"] = packed.T.contiguous()
        return tensors

    def config(self, quant: QuantConfig, ignored: Sequence[str], widths: Widths = None) -> dict[str, Any]:
        """The `quantization_config` that the compressed-tensors package writes for such a checkpoint.

        `ignored` are full names, because readers differ: some match them exactly, some as a part of a name. `widths`
        make a config group for each width. All groups are packed alike, so the format of the whole stays that of each
        ("mixed-precision" is for groups of different formats). A head is named, because it is no "Linear" to vLLM and
        SGLang: they take it for quantized where a target is its name. So is an embedding.
        """
        self.check(quant)
        widths = widths or {}
        if quant.avg_bits is None:
            named = {name: widths[name] for name in outside_blocks(widths)}
            targets = {quant.bits: [], **targets_by_width(named)}
            targets[quant.bits].append("Linear")
        else:
            targets = targets_by_width(widths)
        groups = [_group(quant.at(bits), names) for bits, names in targets.items()]
        return {
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
            "format": LAYOUT,
            "global_compression_ratio": None,
            "ignore": list(dict.fromkeys(ignored)),
            "kv_cache_scheme": None,
            "quant_method": self.name,
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": VERSION,
        }

    def ignored(self, quantization: Mapping[str, Any]) -> tuple[str, ...]:
        """Plain names in `ignore`; its patterns are not names."""
        return tuple(name for name in strings(quantization, "ignore") if not name.startswith("re:"))

    def linears(self, names: Iterable[str], quantization: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        """The quantized Linears and their tensors, sorted; refuses a set that is not whole."""
        check_config(quantization)
        return complete_linears(_PART, names, lambda linear: _parts(scheme_of(linear, quantization)), "its config says")

    def describe(self, linear: str, quantization: Mapping[str, Any], info: Info, load: Load) -> WeightInfo:
        """What `linear` holds, from the headers of its tensors and the two numbers of weight_shape."""
        scheme = scheme_of(linear, quantization)
        infos = {part: info(f"{linear}.{part}") for part in sorted(_parts(scheme))}
        return _check(linear, scheme, infos, load(f"{linear}.weight_shape"))

    def unpack(self, linear: str, quantization: Mapping[str, Any], load: Load) -> QuantizedWeight:
        """Codes, scales and zeros (the middle code where the file stores none) of `linear`; E = 1."""
        scheme = scheme_of(linear, quantization)
        tensors = {part: load(f"{linear}.{part}") for part in sorted(_parts(scheme))}
        (rows, columns) = _check(linear, scheme, tensors, tensors["weight_shape"]).shape
        scales = tensors["weight_scale"].unsqueeze(0)
        codes = _codes(tensors["weight_packed"], scheme, columns).unsqueeze(0)
        if scheme.sym:
            zeros = torch.full(scales.shape, 1 << (scheme.bits - 1), dtype=torch.uint8)
        else:
            packed = tensors["weight_zero_point"].T.contiguous()  # [G, words]
            zeros = _codes(packed, scheme, rows).T.contiguous().unsqueeze(0)
        return QuantizedWeight(codes, scales, zeros, scheme.bits)


def _group(quant: QuantConfig, targets: list[str]) -> dict[str, Any]:
    """A config group: the Linears that `targets` match are as `quant` says."""
    channel = quant.group_size == -1
    weights = {
        "num_bits": quant.bits,
        "type": "int",
        "symmetric": quant.sym,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else quant.group_size,
        "actorder": None,  # whatever order the solver used, the columns on disk are in their own
        "block_structure": None,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "zp_dtype": None,
    }
    return {
        "format": LAYOUT,
        "input_activations": None,
        "output_activations": None,
        "targets": targets,
        "weights": weights,
    }


def _codes(words: Tensor, scheme: Scheme, count: int) -> Tensor:
    """The first `count` codes of every row of `words`, in the layout of the version that wrote them."""
    read = unpack_padded if is_padded(scheme, count, words.shape[-1]) else unpack
    return read(words, scheme.bits, count)


def _parts(scheme: Scheme) -> set[str]:
    """Last names of the tensors that a Linear of this scheme consists of."""
    return {"weight_packed", "weight_scale", "weight_shape"} | (set() if scheme.sym else {"weight_zero_point"})


def _check(linear: str, scheme: Scheme, tensors: Mapping[str, TensorInfo], weight_shape: Tensor) -> WeightInfo:
    """Compares the tensors of one Linear with each other and with its scheme; `CheckpointError` where they differ."""
    if weight_shape.dtype != torch.int64 or tuple(weight_shape.shape) != (2,):
        raise CheckpointError(
            f"weight_shape of {linear!r} is {describe_tensor(weight_shape)}, where int64 [2] is expected"
        )
    rows, columns = (int(size) for size in weight_shape)
    group_size = columns if scheme.group_size == -1 else scheme.group_size
    if rows < 1 or columns < 1 or columns % group_size:
        raise CheckpointError(
            f"weight_shape of {linear!r} is [{rows}, {columns}], which has no groups of {group_size} inputs"
        )
    groups = columns // group_size
    expected: dict[str, list[tuple[int, ...]]] = {
        "weight_packed": [(rows, words) for words in _widths(columns, scheme.bits)],
        "weight_scale": [(rows, groups)],
        "weight_shape": [(2,)],
        "weight_zero_point": [(words, groups) for words in _widths(rows, scheme.bits)],
    }
    for part, tensor in tensors.items():
        if tuple(tensor.shape) not in expected[part]:
            raise CheckpointError(
                f"{part} of {linear!r} is {describe_tensor(tensor)}, where a weight [{rows}, {columns}] of "
                f"{scheme.bits} bits and {groups} groups needs "
                f"{' or '.join(str(list(shape)) for shape in expected[part])}"
            )
        if part in ("weight_packed", "weight_zero_point") and tensor.dtype != torch.int32:
            raise CheckpointError(f"{part} of {linear!r} is {describe_tensor(tensor)}, where int32 is expected")
    dtype = tensors["weight_scale"].dtype
    check_scale_dtype(linear, dtype, _SCALES, LAYOUT)
    return WeightInfo((rows, columns), dtype, scheme.bits, groups, scheme.sym)


def _widths(count: int, bits: int) -> list[int]:
    """Words that `count` codes take, densely and with padded words, without repetition."""
    return list(dict.fromkeys((-(-count * bits // 32), -(-count // (32 // bits)))))

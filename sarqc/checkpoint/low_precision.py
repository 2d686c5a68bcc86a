"""Weights that a model's makers publish in few bits: FP8, MXFP8, MXFP4, NVFP4 and INT8, seen as dense tensors.

Which tensors make up a weight is read off their names and dtypes; the configuration only says that there are such
weights, and how large their blocks are. Here `N` is the weight's name, `P.weight` or that of an experts tensor.

| stored as | what it is |
|---|---|
| `N` float8_e4m3fn, `N_scale_inv` or `N_scale` | FP8 by block, channel or tensor; MXFP8 where the scales are e8m0 |
| `N_blocks`, `N_scales` uint8 | MXFP4 as gpt-oss has it, transposed |
| `N_packed` uint8, `N_scale`, `N_global_scale` | MXFP4 or NVFP4 of compressed-tensors |
| `N` uint8, `N_scale`, `N_scale_2` | NVFP4 of ModelOpt |
| `N` int8, `N_scale_inv` or `scale` e8m0 | MXFP4, two values a byte |
| `N` int8, `N_scale` floating | INT8 by channel or tensor |

A weight is expanded when it is loaded, one tensor at a time, to the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sarqc.checkpoint.formats.base import TensorInfo
from sarqc.checkpoint.headers import Entry
from sarqc.conventions import LOW_PRECISION
from sarqc.errors import CheckpointError
from sarqc_kernels.dequant import dequantize_fp4, dequantize_fp8

Load = Callable[[str], Tensor]
Header = tuple[tuple[int, ...], torch.dtype]

_LAYOUTS = ("float-quantized", "naive-quantized", "int-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
_FP8, _E8M0, _BYTES = torch.float8_e4m3fn, torch.float8_e8m0fnu, (torch.uint8, torch.int8)
_LOW = (torch.uint8, torch.int8, _FP8, torch.float8_e5m2, _E8M0)
_SCALES = ("_scale_inv", "_scale")
_ACTIVATIONS = (
    "input_scale", "output_scale", "activation_scale", "input_global_scale", "input_zero_point", "k_scale", "v_scale",
    "q_scale", "input_scale_inv", "weight_shape", "weight_zero_point",
)  # fmt: skip
"""Last names of tensors that belong to activations, or say nothing that is not known: dropped with the weights' own."""


@dataclass(frozen=True)
class Expanded:
    """A dense weight and how to make it. members: the tensors that it is stored as."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    members: tuple[str, ...]
    make: Callable[[Load, torch.dtype], Tensor]

    def load(self, load: Load) -> Tensor:
        """The dense tensor, out of the stored ones."""
        return self.make(load, self.dtype).contiguous()


@dataclass(frozen=True)
class View:
    """The dense weights of a checkpoint in low precision, and the tensors that stand for them or for nothing."""

    weights: Mapping[str, Expanded]
    hidden: frozenset[str]


def is_low_precision(quantization: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is of a method whose weights are expanded here."""
    method = quantization.get("quant_method")
    return method in LOW_PRECISION or (method == "compressed-tensors" and quantization.get("format") in _LAYOUTS)


def dense_view(entries: Mapping[str, TensorInfo], quantization: Mapping[str, Any], config: Mapping[str, Any]) -> View:
    """The dense weights among the tensors of a checkpoint.

    Raises:
        CheckpointError: a tensor of less than 16 bits that belongs to no weight, or shapes that do not go together.
    """
    dtype = _model_dtype(config)
    block = quantization.get("weight_block_size")
    edge = (block[0], block[1]) if isinstance(block, list) and len(block) == 2 else None
    weights: dict[str, Expanded] = {}
    for name in entries:
        expanded = _weight(name, entries, edge, dtype)
        if expanded is not None:
            weights[expanded[0]] = expanded[1]
    hidden = {member for one in weights.values() for member in one.members} - weights.keys()
    hidden |= {name for name in entries if name.rpartition(".")[2] in _ACTIVATIONS}
    for name, entry in entries.items():
        if entry.dtype in _LOW and name not in hidden and name not in weights:
            raise CheckpointError(
                f"tensor {name!r} is {str(entry.dtype).removeprefix('torch.')} and has no scales that are known: give "
                "a checkpoint in bf16 or fp16"
            )
    return View(weights, frozenset(hidden))


def dense_headers(tensors: Mapping[str, Header], config: Mapping[str, Any]) -> dict[str, Header]:
    """(shape, dtype) of the dense tensors of a checkpoint of which only the headers are here."""
    quantization = config.get("quantization_config") or {}
    if not is_low_precision(quantization):
        return dict(tensors)
    view = dense_view({name: Entry(dtype, shape, 0) for name, (shape, dtype) in tensors.items()}, quantization, config)
    plain = {name: header for name, header in tensors.items() if name not in view.hidden}
    return plain | {name: (weight.shape, weight.dtype) for name, weight in view.weights.items()}


def _weight(
    name: str, entries: Mapping[str, TensorInfo], edge: tuple[int, int] | None, dtype: torch.dtype
) -> tuple[str, Expanded] | None:
    """The weight that tensor `name` holds the codes of, if it does."""
    entry = entries[name]
    scale = next((f"{name}{end}" for end in _SCALES if f"{name}{end}" in entries), None)
    if scale is None and name.endswith(".weight") and f"{name[:-7]}.scale" in entries:
        scale = f"{name[:-7]}.scale"
    if entry.dtype in (_FP8, *_BYTES) and scale is not None:
        _check_rank(name, entry, len(entry.shape) >= 2)
    if entry.dtype == _FP8 and scale is not None:
        block = edge if _blocks(entries[scale].shape, entry.shape) else None
        return name, Expanded(tuple(entry.shape), dtype, (name, scale), _fp8(name, scale, block))
    if name.endswith("_blocks") and f"{name[:-7]}_scales" in entries:
        return name[:-7], _gpt_oss(name[:-7], entry, dtype)
    if name.endswith("_packed") and entry.dtype in _BYTES and f"{name[:-7]}_scale" in entries:
        _check_rank(name, entry, len(entry.shape) >= 2)
        return name[:-7], _fp4(name, name[:-7], entries, "_global_scale", dtype)
    if entry.dtype == torch.uint8 and f"{name}_scale" in entries:
        return name, _fp4(name, name, entries, "_scale_2", dtype)
    if entry.dtype == torch.int8 and scale is not None:
        if entries[scale].dtype in (_E8M0, torch.uint8):
            shape = (*entry.shape[:-1], 2 * entry.shape[-1])
            return name, Expanded(shape, dtype, (name, scale), _mxfp4(name, scale))
        return name, Expanded(tuple(entry.shape), dtype, (name, scale), _int8(name, scale))
    return None


def _check_rank(name: str, entry: TensorInfo, good: bool) -> None:
    if not good:
        raise CheckpointError(f"tensor {name!r} has shape {list(entry.shape)}, which codes of a weight do not have")


def _blocks(scales: Iterable[int], weight: Iterable[int]) -> bool:
    """Whether scales stand for blocks: neither one of the tensor nor one of each row."""
    rows, columns = tuple(weight)[-2:]
    grid = tuple(scales)
    return len(grid) >= 2 and grid[-2:] not in ((1, 1), (rows, 1), (1, columns))


def _fp8(name: str, scale: str, block: tuple[int, int] | None) -> Callable[[Load, torch.dtype], Tensor]:
    def make(load: Load, dtype: torch.dtype) -> Tensor:
        weight = load(name)
        scales = _by_row(load(scale), weight)
        if scales.numel() == 1:
            scales = scales.reshape(1)
        return dequantize_fp8(weight, scales, dtype=dtype, block=block)

    return make


def _by_row(scales: Tensor, weight: Tensor) -> Tensor:
    """Scales of one dimension as a column, where there is one for each row of the weight."""
    return scales[:, None] if scales.dim() == 1 and scales.numel() == weight.shape[-2] else scales


def _gpt_oss(base: str, entry: TensorInfo, dtype: torch.dtype) -> Expanded:
    names = (f"{base}_blocks", f"{base}_scales")
    _check_rank(names[0], entry, len(entry.shape) == 4)
    experts, rows, groups, half = entry.shape

    def make(load: Load, dtype: torch.dtype) -> Tensor:
        return dequantize_fp4(load(names[0]), load(names[1]), dtype=dtype).mT

    return Expanded((experts, groups * half * 2, rows), dtype, names, make)


def _fp4(codes: str, base: str, entries: Mapping[str, TensorInfo], second: str, dtype: torch.dtype) -> Expanded:
    shape, scale, level = entries[codes].shape, f"{base}_scale", f"{base}{second}"
    there = level in entries

    def make(load: Load, dtype: torch.dtype) -> Tensor:
        top = load(level).float() if there else None
        return dequantize_fp4(load(codes), load(scale), dtype=dtype, global_scale=top, divide=second == "_global_scale")

    return Expanded((*shape[:-1], 2 * shape[-1]), dtype, (codes, scale, *([level] if there else [])), make)


def _mxfp4(name: str, scale: str) -> Callable[[Load, torch.dtype], Tensor]:
    return lambda load, dtype: dequantize_fp4(load(name), load(scale), dtype=dtype)


def _int8(name: str, scale: str) -> Callable[[Load, torch.dtype], Tensor]:
    def make(load: Load, dtype: torch.dtype) -> Tensor:
        weight = load(name)
        return (weight.float() * _by_row(load(scale), weight).float()).to(dtype)

    return make


def _model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a config.json gives its model, or its text model; bf16 where it says nothing of use."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    dtypes = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return next((known[name] for name in dtypes if isinstance(name, str) and name in known), torch.bfloat16)

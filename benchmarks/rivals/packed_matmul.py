"""Other packed 4-bit products: torch's own (tinygemm), gemlite and humming, each by the calls its authors show.

All get the same symmetric codes in groups of `group_size` and bf16 scales; packing happens before the clock starts.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.base import Call, Contender, Inputs, Point, installed, on_gpu_only

TINYGEMM_TOKENS = 512  # beyond, tinygemm unpacks the weight again for every few rows and takes milliseconds
INNER_K_TILES = 8


def tinygemm() -> Contender:
    """`aten._weight_int4pack_mm`: in torch, nothing to install."""

    def unsupported(point: Point, device: torch.device) -> str | None:
        if reason := on_gpu_only(point, device) or _other_width(point):
            return reason
        if point.sizes["tokens"] > TINYGEMM_TOKENS:
            return f"made for few tokens: not timed beyond {TINYGEMM_TOKENS}"
        return "takes outputs in multiples of 8 and inputs in multiples of 128" if _odd(point, 8, 128) else None

    def bind(inputs: Inputs) -> Call:
        codes = inputs["codes"][0].to(torch.uint8)
        pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
        words = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), INNER_K_TILES)
        scales = inputs["scales"][0].mT
        grid = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()  # (code - 8) * scale + 0
        group = codes.shape[1] // scales.shape[0]
        return lambda: torch.ops.aten._weight_int4pack_mm(inputs["x"], words, group, grid)

    return Contender("torch int4 (tinygemm)", False, unsupported, bind)


def gemlite() -> Contender:
    """gemlite 0.6 with its committed H100 table; it has none for an H200 and would otherwise tune itself."""

    def unsupported(point: Point, device: torch.device) -> str | None:
        return installed("gemlite") or on_gpu_only(point, device) or _other_width(point)

    def bind(inputs: Inputs) -> Call:
        package: Any = importlib.import_module("gemlite")
        table = next(Path(package.__file__).parent.rglob("h100*.json"), None)
        if table is not None:
            package.load_config(str(table))
        codes, scales = inputs["codes"][0], inputs["scales"][0]
        outputs, columns = codes.shape
        layer = package.GemLiteLinear(
            W_nbits=4, group_size=columns // scales.shape[1], in_features=columns, out_features=outputs,
            input_dtype=package.DType.BF16, output_dtype=package.DType.BF16,
        )  # fmt: skip
        layer.pack(codes, scales, torch.full_like(scales, 8), bias=None)
        return lambda: layer.forward(inputs["x"])

    return Contender("gemlite (h100 table)", False, unsupported, bind)


def humming() -> Contender:
    """humming-kernels 0.1.19, compiled for the shape when it is first asked."""

    def unsupported(point: Point, device: torch.device) -> str | None:
        return installed("humming") or on_gpu_only(point, device) or _other_width(point)

    def bind(inputs: Inputs) -> Call:
        layers: Any = importlib.import_module("humming.layer")
        weight: Tensor = inputs["weight"]
        outputs, columns = weight.shape
        group = columns // inputs["scales"].shape[-1]
        layer = layers.HummingLayer(
            shape_n=outputs, shape_k=columns, weight_config={"dtype": "uint4", "group_size": group}, num_experts=None,
            torch_dtype=torch.bfloat16,
        ).to(weight.device)  # fmt: skip
        layer.load_from_unquantized(weight)
        layer.transform()
        return lambda: layer(inputs["x"])

    return Contender("humming", False, unsupported, bind)


def _other_width(point: Point) -> str | None:
    bits = point.sizes["bits"]
    return None if bits == 4 else f"compared at 4 bits alone, not at {bits}"


def _odd(point: Point, outputs: int, inputs: int) -> bool:
    return bool(point.sizes["outputs"] % outputs or point.sizes["inputs"] % inputs)

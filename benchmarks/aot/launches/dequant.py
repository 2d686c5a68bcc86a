"""Launches of the expansion of source weights: one for each format that checkpoints have."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.aot.jobs import Launch
from sarqc_kernels.dequant import dequant_impl
from sarqc_kernels.device import Device

SIZE = 512
FORMATS = (
    ("fp8 128x128 fp32", False, "float", torch.float32, 128, 128),
    ("fp8 128x128 bf16", False, "float", torch.bfloat16, 128, 128),
    ("mxfp8", False, "e8m0", torch.uint8, 1, 32),
    ("mxfp4", True, "e8m0", torch.uint8, 1, 32),
    ("nvfp4", True, "e4m3", torch.uint8, 1, 16),
)
"""Name, two codes in a byte, kind and dtype of scales, rows and columns of a block."""


def launches(gpu: Device) -> Iterator[Launch]:
    """To bf16; other dtypes differ in one conversion. NVFP4 has a second level of scales."""
    for name, packed, kind, stored, rows, columns in FORMATS:
        codes = torch.zeros(2, SIZE, SIZE // (1 + packed), dtype=torch.uint8)
        scales = torch.ones(2, SIZE // rows, SIZE // columns, dtype=stored)
        level = torch.ones(2) if kind == "e4m3" else None
        call = (codes, scales, level, rows, columns, torch.bfloat16, packed, kind, level is not None)
        yield Launch(name, partial(dequant_impl.dequantize, *call))

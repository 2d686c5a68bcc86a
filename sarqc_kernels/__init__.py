"""Kernels for post-training weight quantization: tensors in, tensors out.

Four operations do the work, and everything has an expert axis E (a dense layer is E = 1):

    gram_accumulate_    activations of a calibration batch -> running Gram X^T X, row counts, sums of |x|
    quantize_columns    weight + factor of the Gram -> codes, scales, zeros, by column rounding with error feedback
    w4a16_matmul        activations times the packed weight, dense or grouped by expert
    w4a16_experts       a layer of experts in two launches; its `Routing` says which token goes where

with `fit_grid` and `round_to_grid` (grids and plain rounding), `coordinate_descent` (codes and scales improve each
other), `cross_gram_accumulate_` (R^T X, for error correction), `gram_finalize` (a Gram's sums -> the regularised matrix
that is factored), `cholesky_upper` (its factor), `symmetrize_` (completes a Gram), `pack` / `unpack` (2 to 8 bit codes
in 32-bit words), `repack` / `unpack_weight` (a packed weight as the machine multiplies it, and back), `dequantize_fp8`
/ `dequantize_fp4` (FP8, MXFP4 and NVFP4 source weights to bf16, fp16 or fp32).
Activations are rows [T, K] sorted by expert with `offsets` [E + 1]; the weight that codes stand for is
(code - zero) * scale.

Each operation is a room: `<op>/__init__.py` states the contract and checks it, `<op>/reference.py` is the same in plain
torch. `backend.py` decides which implementation runs (SARQC_BACKEND forces one) and `explain` says why. Every error is
a `SarqcError`. Nothing here knows models, files or names; torch is imported with the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sarqc_kernels.columns import coordinate_descent, fit_grid, quantize_columns, round_to_grid
    from sarqc_kernels.dequant import dequantize_fp4, dequantize_fp8
    from sarqc_kernels.errors import ArgumentError, BackendError, SarqcError
    from sarqc_kernels.gram import (
        cholesky_upper,
        cross_gram_accumulate_,
        gram_accumulate_,
        gram_finalize,
        symmetrize_,
    )
    from sarqc_kernels.packing import pack, unpack
    from sarqc_kernels.w4a16 import (
        RepackedWeight,
        Routing,
        repack,
        unpack_weight,
        w4a16_experts,
        w4a16_matmul,
        warm_up,
    )

__all__ = [
    "ArgumentError",
    "BackendError",
    "RepackedWeight",
    "Routing",
    "SarqcError",
    "cholesky_upper",
    "coordinate_descent",
    "cross_gram_accumulate_",
    "dequantize_fp4",
    "dequantize_fp8",
    "fit_grid",
    "gram_accumulate_",
    "gram_finalize",
    "pack",
    "quantize_columns",
    "repack",
    "round_to_grid",
    "symmetrize_",
    "unpack",
    "unpack_weight",
    "w4a16_experts",
    "w4a16_matmul",
    "warm_up",
]

_HOME = {
    "ArgumentError": "errors",
    "BackendError": "errors",
    "RepackedWeight": "w4a16",
    "Routing": "w4a16",
    "SarqcError": "errors",
    "cholesky_upper": "gram",
    "coordinate_descent": "columns",
    "cross_gram_accumulate_": "gram",
    "dequantize_fp4": "dequant",
    "dequantize_fp8": "dequant",
    "fit_grid": "columns",
    "gram_accumulate_": "gram",
    "gram_finalize": "gram",
    "pack": "packing",
    "repack": "w4a16",
    "quantize_columns": "columns",
    "unpack_weight": "w4a16",
    "round_to_grid": "columns",
    "symmetrize_": "gram",
    "unpack": "packing",
    "w4a16_experts": "w4a16",
    "w4a16_matmul": "w4a16",
    "warm_up": "w4a16",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sarqc_kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sarqc_kernels.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Column quantization on a CPU in C++ (csrc/columns_cpu.cpp), one call for all columns.

The reference takes a column with seven calls of torch, and a trial of the search with ten. That is thousands of calls
on vectors of some hundred elements, and the calls are most of the time. In C++ a tile of 64 rows goes through all its
columns in a core's own cache.

Codes, scales and zeros equal the reference's bit for bit. Which of torch's sums have which order is a property of its
build for a processor, so `unsupported` compares the two once in a process, on a problem of its own, and refuses where a
bit differs.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from sarqc_kernels import cpu_build
from sarqc_kernels.columns import grid, reference
from sarqc_kernels.columns.descent_reference import REACH, usable_experts
from sarqc_kernels.columns.grid import TRIALS, GridRule, Problem, given_grid, safe_scale
from sarqc_kernels.columns.panels import factors_of
from sarqc_kernels.columns.reference import DEPTH, diagonal_of
from sarqc_kernels.cpu_parts import in_parts
from sarqc_kernels.errors import BackendError
from sarqc_kernels.products import columns_product

__all__ = ["coordinate_descent", "fit_grid", "quantize_columns", "unsupported", "unsupported_reason"]

TILE = 64
"""Rows of a tile: `kLanes` of csrc/lanes.h."""
_CUT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Bits of mantissa that a dtype has less than fp32."""


_PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Whatever the defaults are where the first call is made: models are built on other devices and in other dtypes."""


class Rule(ctypes.Structure):
    """`struct Rule` of csrc/columns_cpu.cpp, field for field, as the other structures here."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("trials", "sym", "cut")),
        *((name, ctypes.c_float) for name in ("top", "middle", "tiny", "most")),
    )


class Columns(ctypes.Structure):
    """`struct Columns`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in
          ("weight", "codes", "scales", "zeros", "factor", "importance", "order")),
        *((name, ctypes.c_int64) for name in ("experts", "rows", "columns", "group_size", "given")),
        ("rule", Rule),
    )  # fmt: skip


class Fit(ctypes.Structure):
    """`struct Fit`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("groups", "importance", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("members", "blocks", "rows")),
        ("rule", Rule),
    )


class Descent(ctypes.Structure):
    """`struct Descent`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "codes", "scales", "zeros", "hessian", "usable")),
        *((name, ctypes.c_int64) for name in ("experts", "rows", "columns", "groups", "passes", "cut")),
        *((name, ctypes.c_float) for name in ("top", "reach")),
    )


def _rule(rule: GridRule) -> Rule:
    kept = torch.finfo(rule.scale_dtype)
    return Rule(
        table=factors_of(rule.bits, rule.sym, torch.device("cpu")).data_ptr(),
        trials=TRIALS if rule.search else 1,
        sym=rule.sym,
        cut=_CUT[rule.scale_dtype],
        top=rule.top,
        middle=rule.middle,
        tiny=kept.tiny,
        most=kept.max,
    )


def quantize_columns(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """`sarqc_kernels.columns.quantize_columns` on a CPU."""
    weight, factor, order, given, _, group_size, rule = problem
    experts, rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.uint8, device="cpu")
    scales, zeros = given_grid(problem)
    if given is None:
        new_scales, new_zeros = (torch.empty(scales.shape, **_PLAIN) for _ in range(2))
    else:
        new_scales, new_zeros = safe_scale(scales.float()), zeros.float()
    if order is None:
        order = torch.arange(columns, device="cpu").expand(experts, columns)
    weight, order = weight.contiguous(), order.contiguous()
    diagonal, usable = diagonal_of(factor)
    divided = torch.div(factor, diagonal.unsqueeze(1), out=torch.empty(factor.shape, **_PLAIN))
    divided[~usable] = 0.0
    importance = diagonal.square()
    call = Columns(
        weight=weight.data_ptr(),
        codes=codes.data_ptr(),
        scales=new_scales.data_ptr(),
        zeros=new_zeros.data_ptr(),
        factor=divided.data_ptr(),
        importance=importance.data_ptr(),
        order=order.data_ptr(),
        experts=experts,
        rows=rows,
        columns=columns,
        group_size=group_size,
        given=given is not None,
        rule=_rule(rule),
    )
    in_parts(_library().sarqc_columns, call, torch.get_num_threads() if experts * rows > TILE else 1)
    if given is None:
        scales, zeros = new_scales.to(rule.scale_dtype), new_zeros.to(torch.uint8)
    return codes, scales, zeros


def fit_tile(tile: Tensor, counts: Tensor | None, rule: GridRule) -> tuple[Tensor, Tensor]:
    """Scales and zeros, fp32 [B, N] both, of a tile [g, B, N] fp32 with importance [g, B] or None for all ones."""
    scales, zeros = tile.new_empty(tile.shape[1:]), tile.new_empty(tile.shape[1:])
    tile = tile.contiguous()
    counts = None if counts is None else counts.contiguous()
    call = Fit(
        groups=tile.data_ptr(),
        importance=0 if counts is None else counts.data_ptr(),
        scales=scales.data_ptr(),
        zeros=zeros.data_ptr(),
        members=tile.shape[0],
        blocks=tile.shape[1],
        rows=tile.shape[2],
        rule=_rule(rule),
    )
    in_parts(_library().sarqc_fit, call, 1)
    return scales, zeros


def fit_grid(weight: Tensor, importance: Tensor | None, group_size: int, rule: GridRule) -> tuple[Tensor, Tensor]:
    """`sarqc_kernels.columns.fit_grid` on a CPU."""
    return grid.fit_by_tiles(weight, importance, group_size, rule, fit_tile)


def coordinate_descent(
    weight: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, hessian: Tensor, bits: int, passes: int
) -> tuple[Tensor, Tensor]:
    """`sarqc_kernels.columns.coordinate_descent` on a CPU, in one call."""
    weight, hessian, zeros = weight.contiguous(), hessian.contiguous(), zeros.contiguous()
    codes = codes.clone(memory_format=torch.contiguous_format)
    new_scales = scales.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    usable = usable_experts(hessian).to(torch.uint8)
    call = Descent(
        weight=weight.data_ptr(),
        codes=codes.data_ptr(),
        scales=new_scales.data_ptr(),
        zeros=zeros.data_ptr(),
        hessian=hessian.data_ptr(),
        usable=usable.data_ptr(),
        experts=weight.shape[0],
        rows=weight.shape[1],
        columns=weight.shape[2],
        groups=scales.shape[2],
        passes=passes,
        cut=_CUT[scales.dtype],
        top=(1 << bits) - 1,
        reach=REACH,
    )
    in_parts(cpu_build.library("descent_cpu", descent=Descent).sarqc_descent, call, torch.get_num_threads())
    return codes, new_scales.to(scales.dtype)


def unsupported(weight: Tensor) -> str | None:
    """Why a weight cannot be taken; None where it can. The first call builds the library and compares it with torch."""
    return (
        unsupported_reason() if weight.device.type == "cpu" else f"tensors are on {weight.device.type}, not on the CPU"
    )


@functools.cache
def unsupported_reason() -> str | None:
    """The reason why this implementation does not run on this machine; None where it does."""
    try:
        return None if _equals_torch() else (
            "torch adds in another order on this processor than csrc/columns_cpu.cpp does, so codes would differ"
        )  # fmt: skip
    except BackendError as error:
        return str(error)


def _library() -> ctypes.CDLL:
    """The library with the types of its functions. Raises BackendError where there is none, or an old one."""
    return cpu_build.library("columns_cpu", columns=Columns, fit=Fit)


def _equals_torch() -> bool:
    """Whether problems that have every kind of sum come out with torch's bits.

    Where a column is a group of its own, its scale shows its sum; a symmetric grid leaves errors there for others to
    compensate. Wider groups are fitted.
    """
    generator = torch.Generator().manual_seed(0)
    experts, rows, columns = 1, 70, 3 * reference.PANEL
    weight = torch.randn(experts, rows, columns, generator=generator, **_PLAIN)
    factor = (torch.randn(experts, columns, columns, generator=generator, **_PLAIN) / 32).triu(1)
    factor += torch.eye(columns, **_PLAIN)

    def same(group_size: int) -> bool:
        rule = GridRule(3, group_size == 1, group_size > 1, torch.float32)
        problem = Problem(weight, factor, None, None, None, group_size, rule)
        results = (solve(problem) for solve in (quantize_columns, reference.quantize_columns))
        return all(torch.equal(ours, theirs) for ours, theirs in zip(*results))

    return _keeps_order(generator) and same(1) and same(DEPTH)


def _keeps_order(generator: torch.Generator) -> bool:
    """Whether BLAS adds a product of `DEPTH` columns in their order, each with one fused step."""
    left, right = (torch.randn(DEPTH, width, generator=generator, **_PLAIN) for width in (96, 70))
    total = torch.zeros(96, 70, **_PLAIN)
    for one, other in zip(left, right):
        total.addcmul_(one[:, None], other)
    return torch.equal(columns_product(left, right), total)

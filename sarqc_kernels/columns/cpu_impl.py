"""Column quantization on a CPU: the reference's walk and products, its many small steps in C++ (csrc/columns_cpu.cpp).

The reference takes a column with seven calls of torch, and a trial of the search with ten. That is thousands of calls
on vectors of some hundred elements, and the calls are most of the time. Here a stretch of columns, or the fit of its
groups, is one call; large products stay with BLAS.

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
from sarqc_kernels.columns.descent_reference import DEPTH, REACH, usable_experts
from sarqc_kernels.columns.grid import TRIALS, GridRule, Problem
from sarqc_kernels.columns.panels import factors_of
from sarqc_kernels.columns.reference import Work
from sarqc_kernels.errors import BackendError
from sarqc_kernels.products import columns_product

__all__ = ["coordinate_descent", "fit_grid", "quantize_columns", "unsupported", "unsupported_reason"]

_CUT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Bits of mantissa that a dtype has less than fp32."""


_PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Whatever the defaults are where the first call is made: models are built on other devices and in other dtypes."""


class Stretch(ctypes.Structure):
    """`struct Stretch` of csrc/columns_cpu.cpp, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in
          ("weight", "delta", "codes", "pull", "inside", "scales", "zeros", "group_of")),
        *((name, ctypes.c_int64) for name in
          ("experts", "rows", "columns", "first", "begin", "end", "last", "group")),
        ("top", ctypes.c_float),
    )  # fmt: skip


class Fit(ctypes.Structure):
    """`struct Fit` of csrc/columns_cpu.cpp, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("groups", "importance", "table", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("members", "blocks", "rows", "trials", "sym", "cut")),
        *((name, ctypes.c_float) for name in ("top", "middle", "tiny", "most")),
    )


class Descent(ctypes.Structure):
    """`struct Descent` of csrc/columns_cpu.cpp, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "codes", "scales", "zeros", "hessian", "usable")),
        *((name, ctypes.c_int64) for name in ("experts", "rows", "columns", "groups", "passes", "cut")),
        *((name, ctypes.c_float) for name in ("top", "reach")),
    )


class CppSteps:
    """`reference.Steps` by the compiled library."""

    def __init__(self, made: ctypes.CDLL) -> None:
        self.made = made

    def fit(self, groups: Tensor, importance: Tensor | None, rule: GridRule, scales: Tensor, zeros: Tensor) -> None:
        """See `reference.Steps`; without importance all are ones."""
        groups = groups.contiguous()
        importance = None if importance is None else importance.contiguous()
        table = factors_of(rule.bits, rule.sym, groups.device)
        kept = torch.finfo(rule.scale_dtype)
        call = Fit(
            groups=groups.data_ptr(),
            importance=0 if importance is None else importance.data_ptr(),
            table=table.data_ptr(),
            scales=scales.data_ptr(),
            zeros=zeros.data_ptr(),
            members=groups.shape[0],
            blocks=groups.shape[1],
            rows=groups.shape[2],
            trials=TRIALS if rule.search else 1,
            sym=rule.sym,
            cut=_CUT[rule.scale_dtype],
            top=rule.top,
            middle=rule.middle,
            tiny=kept.tiny,
            most=kept.max,
        )
        self.made.sarqc_fit(ctypes.byref(call), 0, 1)

    def columns(self, work: Work, inside: Tensor, pull: Tensor, first: int, begin: int, end: int) -> None:
        """See `reference.Steps`."""
        columns, experts, rows = work.weight.shape
        group_of = work.group_of.contiguous()
        call = Stretch(
            weight=work.weight.data_ptr(),
            delta=work.delta.data_ptr(),
            codes=work.codes.data_ptr(),
            pull=pull.data_ptr(),
            inside=inside.data_ptr(),
            scales=work.scales.data_ptr(),
            zeros=work.zeros.data_ptr(),
            group_of=group_of.data_ptr(),
            experts=experts,
            rows=rows,
            columns=columns,
            first=first,
            begin=begin,
            end=end,
            last=first + len(pull),
            group=-1 if work.given else begin // work.group_size,
            top=work.rule.top,
        )
        self.made.sarqc_stretch(ctypes.byref(call), 0, 1)


def quantize_columns(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """`sarqc_kernels.columns.quantize_columns` on a CPU."""
    return reference.run_panels(problem, CppSteps(_library()))


def fit_grid(weight: Tensor, importance: Tensor | None, group_size: int, rule: GridRule) -> tuple[Tensor, Tensor]:
    """`sarqc_kernels.columns.fit_grid` on a CPU."""
    steps = CppSteps(_library())

    def fit(tile: Tensor, counts: Tensor | None, rule: GridRule) -> tuple[Tensor, Tensor]:
        scales, zeros = tile.new_empty(tile.shape[1:]), tile.new_empty(tile.shape[1:])
        steps.fit(tile, counts, rule, scales, zeros)
        return scales, zeros

    return grid.fit_by_tiles(weight, importance, group_size, rule, fit)


def coordinate_descent(
    weight: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, hessian: Tensor, bits: int, passes: int
) -> tuple[Tensor, Tensor]:
    """`sarqc_kernels.columns.coordinate_descent` on a CPU, in one call."""
    weight, hessian, zeros = weight.contiguous(), hessian.contiguous(), zeros.contiguous()
    codes, new_scales = codes.clone(memory_format=torch.contiguous_format), scales.float().contiguous()
    if new_scales.data_ptr() == scales.data_ptr():
        new_scales = new_scales.clone()
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
    cpu_build.in_parts(_library().sarqc_descent, call, torch.get_num_threads())
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
        return None if _equals_torch(CppSteps(_library())) else (
            "torch adds in another order on this processor than csrc/columns_cpu.cpp does, so codes would differ"
        )  # fmt: skip
    except BackendError as error:
        return str(error)


def _library() -> ctypes.CDLL:
    """The library with the types of its functions. Raises BackendError where there is none, or an old one."""
    kinds = {"stretch": Stretch, "fit": Fit, "descent": Descent}
    return cpu_build.library("columns_cpu", **kinds)


def _equals_torch(steps: CppSteps) -> bool:
    """Whether the sums of a problem have torch's bits: deltas of columns, which hold every sum, and searched scales."""
    generator = torch.Generator().manual_seed(0)
    experts, rows, columns = 1, 70, reference.PANEL
    weight = torch.randn(columns, experts, rows, generator=generator, **_PLAIN)
    inside = (torch.randn(experts, columns, columns, generator=generator, **_PLAIN) / 4).triu(1)
    inside += torch.eye(columns, **_PLAIN)
    rule = GridRule(3, False, True, torch.float32)
    scales, zeros = (torch.full((1, experts, rows), value, **_PLAIN) for value in (0.1, 3.0))
    results = []
    for own in (steps, reference.TorchSteps()):
        work = Work(
            weight=weight,
            delta=torch.empty_like(weight),
            codes=torch.empty_like(weight, dtype=torch.uint8),
            scales=scales,
            zeros=zeros,
            factor=inside,
            diagonal=torch.ones(experts, columns, **_PLAIN),
            usable=torch.ones(experts, dtype=torch.bool, device="cpu"),
            group_of=torch.zeros(experts, columns, dtype=torch.int64, device="cpu"),
            group_size=columns,
            given=True,
            rule=rule,
        )
        pull = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), **_PLAIN)
        own.columns(work, inside, pull, 0, 0, 100)  # the compensation of the rest of the panel stays in `pull`
        grid_found = torch.empty(2, experts, rows, **_PLAIN)
        own.fit(weight, weight[:, :, 0].square(), rule, grid_found[0], grid_found[1])
        results.append((work.delta[:100], work.codes[:100], pull[100:], grid_found))
    return _keeps_order(generator) and all(torch.equal(ours, theirs) for ours, theirs in zip(*results))


def _keeps_order(generator: torch.Generator) -> bool:
    """Whether BLAS adds a product of `DEPTH` columns in their order, each with one fused step."""
    left, right = (torch.randn(DEPTH, width, generator=generator, **_PLAIN) for width in (96, 70))
    total = torch.zeros(96, 70, **_PLAIN)
    for one, other in zip(left, right):
        total.addcmul_(one[:, None], other)
    return torch.equal(columns_product(left, right), total)

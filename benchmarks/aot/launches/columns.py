"""Launches of column quantization: panel products, columns, fits, coordinate descent, rounding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.aot.jobs import Launch
from sarqc_kernels.aot import TENSOR_CORE
from sarqc_kernels.columns import config, descent_impl, fit_impl, triton_impl
from sarqc_kernels.columns.config import MICRO, PANEL
from sarqc_kernels.columns.grid import GridRule
from sarqc_kernels.columns.panels import Action, Work
from sarqc_kernels.device import Device

GROUP, EVEN, ODD = 128, 512, 500
NARROW = 16  # inputs of a group where groups are to be many
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
RULES = (  # a scale's dtype is one conversion: it need not meet every kind of grid
    GridRule(4, True, True, torch.float16),
    GridRule(4, False, True, torch.bfloat16),
    GridRule(4, False, False, torch.float32),
)


def launches(gpu: Device) -> Iterator[Launch]:
    """Every kernel for every tile; the panel product for odd sizes too, whose loads are word by word."""
    core = {"pull": (TENSOR_CORE[gpu.arch],)}
    for own in config.tiles(gpu).values():
        steps = triton_impl.Steps(own)
        tile = f"{own.product_columns}x{own.product_rows}x{own.product_depth}"
        for size in (EVEN, ODD):
            work = _work(size, RULES[0])
            yield Launch(f"{tile}{' odd' * (size == ODD)}", partial(steps.pull, work, PANEL, 2 * PANEL), core)
        for action in ("round", "free"):
            yield _columns(steps, _work(EVEN, RULES[0]), action, action)
        for rule in RULES:
            work, kind = _work(EVEN, rule), _named(rule)
            yield _columns(steps, work, "fit", f"fit {kind}")
            yield Launch(f"{kind} {own.rows}", partial(steps.fit, work, PANEL, 3 * PANEL))
            yield _fit_groups(gpu, own, rule)
    yield from _rounded()
    grid = torch.ones(2, 64, EVEN // GROUP)
    codes, zeros = torch.zeros(2, 64, EVEN, dtype=torch.uint8), torch.zeros_like(grid, dtype=torch.uint8)
    weight, hessian = torch.zeros(2, 64, EVEN), torch.eye(EVEN).expand(2, -1, -1)
    descent = (weight, codes, grid, zeros, hessian, 4, 2)
    yield Launch("", partial(descent_impl.coordinate_descent, *descent))


def _columns(steps: triton_impl.Steps, work: Work, action: Action, name: str) -> Launch:
    return Launch(f"{name} {steps.config.rows}", partial(steps.columns, work, PANEL, 2 * PANEL, action))


def _named(rule: GridRule) -> str:
    return f"{'sym' if rule.sym else 'asym'}{' search' * rule.search} {NAMES[rule.scale_dtype]}"


def _work(size: int, rule: GridRule) -> Work:
    """A batch of two experts with `size` rows and columns."""
    vectors, grid = torch.empty(2, size), torch.empty(2, -(-size // GROUP), size)
    matrix = torch.empty(2, size, size)
    return Work(
        weight=matrix, delta=matrix, codes=matrix.byte(), pull=torch.empty(2, PANEL, size),
        ahead=torch.empty(2, MICRO, size), scales=grid, zeros=grid, factor=matrix,
        usable=torch.ones(2, dtype=torch.int32), inverse=vectors, importance=vectors,
        group_of=torch.zeros(2, size, dtype=torch.int32), group_size=GROUP, rule=rule,
    )  # fmt: skip


def _fit_groups(gpu: Device, own: config.Config, rule: GridRule) -> Launch:
    """The fit of a weight as it is: groups enough that the tile for many rows is chosen, or few."""
    groups = next(groups for groups in (1, 1024) if fit_impl.rule(groups, 64, gpu) == own)
    weight = torch.zeros(1, 64, groups * NARROW)
    call = (weight, torch.ones(1, groups * NARROW), NARROW, rule)
    return Launch(f"{_named(rule)} {own.rows}", partial(fit_impl.fit_grid, *call))


def _rounded() -> Iterator[Launch]:
    weight, zeros = torch.zeros(1, 64, EVEN), torch.zeros(1, 64, EVEN // GROUP, dtype=torch.uint8)
    for dtype, name in NAMES.items():
        call = (weight, torch.ones_like(zeros, dtype=dtype), zeros, 4)
        yield Launch(name, partial(fit_impl.round_to_grid, *call))

"""GPTQ: columns quantized one by one, each error compensated by the columns that follow (arXiv 2210.17323)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sarqc.config import MethodConfig, QuantConfig
from sarqc.method.awq import Scaling
from sarqc.method.hessian import Factor, Objective, factor
from sarqc.method.rtn import Solution
from sarqc.method.weight import QuantizedWeight
from sarqc_kernels.columns import coordinate_descent, fit_grid, quantize_columns


def column_order(diagonal: Tensor, group_size: int, order: Literal["none", "static", "group"]) -> Tensor | None:
    """The order [E, K] int64 of columns by decreasing `diagonal` [E, K], or None for the given order.

    "static" sorts all columns. "group" is group-aware reordering (arXiv 2505.14638): it sorts groups by their sum and
    the columns inside each group, so the columns of a group stay together and its scales are fitted when the solver
    reaches it. Sorting is stable, so equal input gives equal output.
    """
    if order == "none":
        return None
    if order == "static":
        return diagonal.argsort(dim=-1, descending=True, stable=True)
    grouped = diagonal.view(len(diagonal), -1, group_size)
    inside = grouped.argsort(dim=-1, descending=True, stable=True)
    groups = grouped.sum(-1).argsort(dim=-1, descending=True, stable=True)
    columns = inside.gather(1, groups[:, :, None].expand_as(inside)) + groups[:, :, None] * group_size
    return columns.flatten(1)


def solver_factor(site: str, objective: Objective, quant: QuantConfig, method: MethodConfig) -> Factor:
    """The factor of the objective's Hessian, in the order of the solver's columns."""
    hessian = objective.hessian(method)
    return _factored(site, hessian, _order(hessian, quant, method))


def loss_weight(site: str, objective: Objective, quant: QuantConfig, method: MethodConfig) -> Tensor:
    """Weights of the channel-scale search: the Hessian [E, K, K], or M_jj^2 [E, K] where GPTQ follows."""
    hessian = objective.hessian(method)
    if method.solver == "rtn":
        return hessian
    order = _order(hessian, quant, method)
    weight = _factored(site, hessian, order).matrix.diagonal(dim1=-2, dim2=-1).square()
    return weight if order is None else torch.empty_like(weight).scatter_(1, order, weight)


def solve_gptq(
    site: str,
    weight: Tensor,
    objective: Objective,
    quant: QuantConfig,
    method: MethodConfig,
    scale_dtype: torch.dtype,
    scaling: Scaling | None = None,
) -> Solution:
    """GPTQ with the Hessian H + lambda D (arXiv 2210.17323), without an inverse.

    One factor M M^T of the Hessian gives the error feedback and, as M_jj^2, the loss weight of column j; searched
    scales are fitted with those weights. `method.cd_passes` of coordinate descent then refine codes and scales with the
    same Hessian.
    """
    group_size = quant.columns_per_group(weight.shape[-1])
    hessian = objective.hessian(method)
    if scaling is not None:
        weight, hessian = scaling.apply(weight), scaling.hessian(hessian)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    order = _order(hessian, quant, method)
    search = method.scales == "search"
    scales = zeros = None
    if method.act_order == "static":
        scales, zeros = fit_grid(
            weight,
            diagonal.contiguous(),
            bits=quant.bits,
            group_size=group_size,
            sym=quant.sym,
            search=search,
            scale_dtype=scale_dtype,
        )
    factored = objective.factored or _factored(site, hessian, order)
    codes, scales, zeros = quantize_columns(
        weight,
        factored.matrix,
        order,
        scales,
        zeros,
        bits=quant.bits,
        group_size=group_size,
        sym=quant.sym,
        search=search,
        scale_dtype=scale_dtype,
    )
    damping = factored.damping
    if method.cd_passes:
        del factored
        # `diagonal` is a view: the metric becomes what was factored
        diagonal += damping.to(diagonal)[:, None] * diagonal.mean(-1, keepdim=True)
        codes, scales = coordinate_descent(
            weight, codes, scales, zeros, hessian, bits=quant.bits, passes=method.cd_passes
        )
    return Solution(QuantizedWeight(codes, scales, zeros, quant.bits), damping)


def _order(hessian: Tensor, quant: QuantConfig, method: MethodConfig) -> Tensor | None:
    group_size = quant.columns_per_group(hessian.shape[-1])
    return column_order(hessian.diagonal(dim1=-2, dim2=-1), group_size, method.act_order)


def _factored(site: str, hessian: Tensor, order: Tensor | None) -> Factor:
    return factor(hessian if order is None else _permuted(hessian, order), site)


def _permuted(hessian: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of each matrix [E, K, K] in `order` [E, K]."""
    if hessian.device.type == "cpu":  # a third of the time of two gathers, which read an index for every element
        return torch.stack([own.index_select(0, at).index_select(1, at) for own, at in zip(hessian, order)])
    rows = hessian.gather(1, order[:, :, None].expand_as(hessian))
    return rows.gather(2, order[:, None, :].expand_as(hessian))

"""RTN: every weight to its nearest code, with min-max or searched scales. Also the solver of the AWQ methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sarqc.config import MethodConfig, QuantConfig
from sarqc.method.awq import Scaling
from sarqc.method.hessian import Objective
from sarqc.method.scale_search import search_scales
from sarqc.method.weight import QuantizedWeight
from sarqc_kernels.columns import fit_grid, round_to_grid
from sarqc_kernels.columns.grid import GridRule


@dataclass(frozen=True)
class Solution:
    """Result of a solver.

    Attributes:
        weight: The quantized weight, E experts.
        damping: Damping that was added for each expert, relative to the mean of diag(H), floating [E].
    """

    weight: QuantizedWeight
    damping: Tensor


def quantize_rtn(weight: Tensor, quant: QuantConfig, grid: str, scale_dtype: torch.dtype) -> QuantizedWeight:
    """RTN. grid: "minmax" spans each group, "search" minimises the squared error of each group."""
    group_size = quant.columns_per_group(weight.shape[-1])
    scales, zeros = fit_grid(
        weight,
        None,
        bits=quant.bits,
        group_size=group_size,
        sym=quant.sym,
        search=grid == "search",
        scale_dtype=scale_dtype,
    )
    return QuantizedWeight(round_to_grid(weight, scales, zeros, bits=quant.bits), scales, zeros, quant.bits)


def solve_rtn(
    site: str,
    weight: Tensor,
    objective: Objective,
    quant: QuantConfig,
    method: MethodConfig,
    scale_dtype: torch.dtype,
    scaling: Scaling | None = None,
) -> Solution:
    """RTN with scales that minimise the error weighted by the Hessian H + lambda D (`method.scale_search`)."""
    hessian = objective.hessian(method)
    if scaling is not None:
        weight, hessian = scaling.apply(weight), scaling.hessian(hessian)
    if method.scales == "minmax":
        rounded = quantize_rtn(weight, quant, method.scales, scale_dtype)
    else:
        rule = GridRule(quant.bits, quant.sym, True, scale_dtype)
        scales, zeros = search_scales(weight, hessian, rule, quant.columns_per_group(weight.shape[-1]))
        codes = round_to_grid(weight, scales, zeros, bits=quant.bits)
        rounded = QuantizedWeight(codes, scales, zeros, quant.bits)
    return Solution(rounded, torch.zeros_like(objective.reg_lambda))

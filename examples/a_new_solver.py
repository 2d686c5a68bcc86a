"""A solver of your own: what it must be, and how it runs over a whole model beside the built-in ones.

    python examples/a_new_solver.py

This one rounds to the nearest code and then gives each group the scale that fits those codes best, by weighted least
squares, a few times over. It is a `sarqc.method.layer.Solver`: any function of these arguments. It gets one site, which
is one weight or all experts of a layer at once, and what is known of its inputs; everything else is done for it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import sarqc
from sarqc.errors import ArgumentError
from sarqc.method.awq import Scaling
from sarqc.method.gram import Gram
from sarqc.method.layer import SOLVERS
from sarqc.method.rtn import Solution
from sarqc.method.weight import QuantizedWeight
from sarqc_kernels import round_to_grid


def least_squares(
    site: str,
    weight: Tensor,  # fp32 [E, N, K]
    gram: Gram,
    reg_lambda: Tensor,  # lambda of each expert, fp32 [E]; this solver has no regulariser
    quant: sarqc.QuantConfig,
    method: sarqc.MethodConfig,
    scale_dtype: torch.dtype,
    scaling: Scaling | None = None,
) -> Solution:
    """RTN with scales that minimise sum_j E[x_j^2] (w_j - s q_j)^2 in each group."""
    if not quant.sym:
        raise ArgumentError(f"sym = False: {site} goes through a solver for symmetric grids; use --sym")
    if scaling is not None:
        weight = scaling.apply(weight)
    count, middle = quant.groups(weight.shape[-1]), quant.levels // 2
    groups = weight.unflatten(-1, (count, -1))  # [E, N, G, K / G]
    price = gram.hessian().diagonal(dim1=1, dim2=2).clamp(min=1e-8).unflatten(-1, (count, -1))[:, None]
    scales = groups.abs().amax(-1, keepdim=True) / (middle - 0.5)
    for _ in range(4):
        codes = (groups / scales.clamp(min=1e-12)).round().clamp(-middle, middle - 1)
        scales = (price * groups * codes).sum(-1, keepdim=True) / (price * codes**2).sum(-1, keepdim=True).clamp(1e-12)
    stored = scales[..., 0].to(scale_dtype).clamp(min=torch.finfo(scale_dtype).tiny)
    zeros = torch.full_like(stored, middle, dtype=torch.uint8)
    rounded = QuantizedWeight(round_to_grid(weight, stored, zeros, bits=quant.bits), stored, zeros, quant.bits)
    return Solution(rounded, damping=torch.zeros(len(weight)))


def main(model: str = "smollm2", out: str | Path = "solvers", **settings: Any) -> dict[str, float]:
    """Mean relative output error of the new solver and of two built-in methods, on the same calibration text."""
    settings = {"bits": 4, "num_samples": 8, "seqlen": 256} | settings
    errors = {}
    for method in ("rtn-search", "sarqc-gptq"):
        errors[method] = sarqc.quantize(model, Path(out) / method, method=method, **settings).report["error"]
    with patch.dict(SOLVERS, rtn=least_squares):  # "rtn-search" is the preset that collects Grams and calls "rtn"
        found = sarqc.quantize(model, Path(out) / "least-squares", method="rtn-search", **settings)
    errors["least-squares"] = found.report["error"]
    for name, error in errors.items():
        print(f"{name:<14} output error {error:.2e}")
    return errors


if __name__ == "__main__":
    main(*sys.argv[1:3])

"""A solver of your own: what it must be, and how it runs over a whole model beside the built-in ones.

    python examples/a_new_solver.py

This one rounds to the nearest code and then gives each group the scale that fits those codes best, by weighted least
squares, a few times over. It is a `sarqc.Solver`: any function of these arguments. It gets one layer, or all experts of
a layer at once, and what is known of its inputs; everything else is done for it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sarqc
from sarqc_kernels import round_to_grid


def least_squares(
    site: str,
    weight: Tensor,  # fp32 [E, N, K]
    objective: sarqc.Objective,  # the Gram of the inputs, and lambda; this solver has no regulariser
    quant: sarqc.QuantConfig,
    method: sarqc.MethodConfig,
    scale_dtype: torch.dtype,
    scaling: sarqc.Scaling | None = None,
) -> sarqc.Solution:
    """Round-to-nearest with scales that minimise sum_j E[x_j^2] (w_j - s q_j)^2 in each group."""
    if not quant.sym:
        raise sarqc.ArgumentError(f"sym = False: {site} goes through a solver for symmetric scales; use --sym")
    if scaling is not None:
        weight = scaling.apply(weight)
    count, middle = quant.groups(weight.shape[-1]), quant.levels // 2
    groups = weight.unflatten(-1, (count, -1))  # [E, N, G, K / G]
    energy = objective.gram.diagonal().clamp(min=1e-8).unflatten(-1, (count, -1))[:, None]
    scales = groups.abs().amax(-1, keepdim=True) / (middle - 0.5)
    for _ in range(4):
        codes = (groups / scales.clamp(min=1e-12)).round().clamp(-middle, middle - 1)
        scales = (energy * groups * codes).sum(-1, keepdim=True) / (energy * codes**2).sum(-1, keepdim=True).clamp(
            1e-12
        )
    stored = scales[..., 0].to(scale_dtype).clamp(min=torch.finfo(scale_dtype).tiny)
    zeros = torch.full_like(stored, middle, dtype=torch.uint8)
    rounded = sarqc.QuantizedWeight(round_to_grid(weight, stored, zeros, bits=quant.bits), stored, zeros, quant.bits)
    return sarqc.Solution(rounded, damping=torch.zeros(len(weight)))


def main(model: str = "smollm2", out: str | Path = "solvers", **options: Any) -> dict[str, float]:
    """Mean relative output error of the new solver and of two built-in methods, on the same calibration data."""
    sarqc.register_solver("least-squares", least_squares, reg_lambda=0.0, expert_shrinkage=0.0)
    options = {"bits": 4, "num_samples": 8, "seqlen": 256} | options
    errors = {}
    for method in ("rtn-search", "sarqc-gptq", "least-squares"):
        errors[method] = sarqc.quantize(model, Path(out) / method, method=method, **options).error
    for name, error in errors.items():
        print(f"{name:<14} output error {error:.2e}")
    return errors


if __name__ == "__main__":
    main(*sys.argv[1:3])

"""How fast this machine is: the run's own functions, timed on small matrices in about a second.

Nothing that is computed here goes into a run; what is drawn comes from a generator of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sarqc.config import MethodConfig, QuantConfig
from sarqc.estimation import shapes
from sarqc.method.gram import Gram
from sarqc.method.hessian import Objective, factor
from sarqc.method.layer import SOLVERS
from sarqc.method.rtn import quantize_rtn
from sarqc.pipeline.plan import Plan

WIDTH, ROWS, TOKENS = 512, 256, 512
"""Sizes of the probe, where those of the model are larger."""
FACTORED = 1024
"""Inputs of the matrix that is factored: at fewer, a CPU is far from its rate."""
SECONDS = 0.1
"""Time for one figure, if it takes more than two calls."""
PRODUCTS = 2
"""Products of the weight with a K x K matrix in a pass of coordinate descent."""


@dataclass(frozen=True)
class Rates:
    """Flop/s of forward passes, of Grams and of products in fp32; elements/s of a pass over memory; seconds of a call.

    factored: seconds to factor a Hessian of `factored_width` inputs. column, element: seconds of the solver for a
    column and for an element of the weight, beside factor and products.
    """

    forward: float
    gram: float
    product: float
    stream: float
    call: float
    factored: float
    factored_width: int
    column: float
    element: float

    def factor(self, width: int) -> float:
        """Seconds to factor a Hessian [width, width]."""
        larger = width / self.factored_width
        return self.factored * larger ** (3 if larger > 1 else 2)

    def solve(self, rows: int, width: int, products: int) -> float:
        """Seconds to solve a matrix [rows, width] with `products` products by its Hessian."""
        flops = 2.0 * products * rows * width**2
        return self.factor(width) + self.column * width + self.element * rows * width + flops / self.product

    def __str__(self) -> str:
        return (
            f"{self.forward / 1e9:.0f} GFLOP/s forward, {self.gram / 1e9:.0f} Grams, {self.product / 1e9:.0f} products "
            f"in fp32, {1e9 * self.element:.0f} ns an element in the solver"
        )


def products(method: MethodConfig) -> int:
    """Products of a weight with a matrix of its Gram's size that solving takes."""
    return 0 if method.solver == "rtn" else 1 + PRODUCTS * method.cd_passes


def measure(plan: Plan) -> Rates:
    """The rates of this machine, at sizes no larger than the plan's."""
    sites = max((members for _, members in shapes.blocks(plan)), key=len)
    widest = max((site.in_features for site in sites), default=WIDTH)
    rows = min(ROWS, max((site.rows for site in sites), default=ROWS))
    size = plan.quant.group_size
    step = size if isinstance(size, int) and size > 0 else 1
    width = max(step, min(widest, WIDTH) // step * step)
    quant = plan.quant.at(plan.quant.bits)
    return _measure(plan.device, plan.dtype, quant, plan.method, width, rows, min(widest, FACTORED))


@cache
def _measure(
    device: torch.device,
    dtype: torch.dtype,
    quant: QuantConfig,
    method: MethodConfig,
    width: int,
    rows: int,
    factored: int,
) -> Rates:
    drawn = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn).to(device)

    scale = 1 if device.type == "cpu" else 8  # a GPU needs more at once
    x = random(TOKENS, scale * width).to(dtype)
    layer = nn.Linear(scale * width, scale * width, bias=False, device=device, dtype=dtype).requires_grad_(False)
    single, square = x.float(), random(scale * width, scale * width)
    sums, small, long = Gram.zeros(1, scale * width, device), layer(x[:1, :1].expand(1, scale * width)), random(1 << 20)
    flops = 2.0 * x.numel() * scale * width
    large = Objective(Gram.zeros(1, factored, device), torch.ones(1, device=device))
    large.gram.add(random(2 * factored, factored))
    rates = Rates(
        forward=flops / _least(lambda: layer(x), device),
        gram=flops / _least(lambda: sums.add(x), device),
        product=flops / _least(lambda: single @ square, device),
        stream=long.numel() / _least(lambda: long * 2.0, device),
        call=_least(lambda: layer(small), device),
        factored=_least(lambda: factor(large.hessian(method), "probe"), device),
        factored_width=factored,
        column=0.0,
        element=0.0,
    )
    objective = Objective(Gram.zeros(1, width, device), large.reg_lambda)
    objective.gram.add(random(2 * width, width))

    def solving(count: int) -> float:
        weight = random(1, count, width)
        if not method.calibrated:
            return _least(lambda: quantize_rtn(weight, quant, method.scales, torch.bfloat16), device)
        solve = SOLVERS[method.solver]
        return _least(lambda: solve("probe", weight, objective, quant, method, torch.bfloat16), device)

    few, many = max(1, rows // 4), rows
    beside = [solving(count) - rates.solve(count, width, products(method)) for count in (few, many)]
    element = max(0.0, (beside[1] - beside[0]) / max(1, many - few) / width)
    return replace(rates, element=element, column=max(0.0, beside[1] / width - element * many))


def _least(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the quickest of several calls, which is the one that was disturbed least."""
    times: list[float] = []
    while len(times) < 2 or (len(times) < 7 and sum(times) < SECONDS):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return max(min(times), 1e-7)

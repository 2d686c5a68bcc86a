"""Channel scales: inputs that matter get finer steps, by a search that needs nothing but the Gram (after AWQ).

Multiplying input j of a weight by s_j and dividing what makes that input by s_j changes nothing before rounding. After
it, a large s_j has made the steps of input j finer, at the cost of its group. The scales tried are powers of how large
the input is,

    s_j = a_j^rho / sqrt(max a^rho * min a^rho),    a_j = E|x_j|,    rho = 0, 0.05 .. 0.95

(arXiv 2306.00978), judged by the error E = W - Q(W S) S^-1 that RTN leaves. Errors are always measured in
the original space: with E there, the regulariser needs no scales either, and rho = 0, the identity, is a candidate like
any other, so the choice is never worse than no scales in the measure it is made by. That measure is

- tr(E (H + lambda D) E^T) on min-max grids, where every weight is then rounded to its nearest code: as AWQ does;
- sum_j M_jj^2 |E_j|^2 with M M^T = H + lambda D, on grids searched with these prices, where GPTQ follows:
  column j's error costs that much once the columns after it have corrected what they can. Searched grids leave scales
  less to win, so rho = 0, 0.1 .. 0.5 will do; judged on min-max grids the choice goes too far and makes models worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sarqc.config import QuantConfig
from sarqc.method.gram import Gram
from sarqc.method.scale_search import minmax_error, searched_error
from sarqc_kernels.columns.grid import GridRule

EXPONENTS = tuple(step / 20 for step in range(20))
SMALL_EXPONENTS = EXPONENTS[:11:2]
VOTERS, PRICED_VOTERS = 1024, 256
"""Rows of each matrix that a candidate is judged on, evenly spaced, by a metric and by prices; all of them would cost
as much as solving does."""
FLOOR = 1e-2
"""Least a_j relative to the mean: an input that calibration never excited keeps weights that can be told from zero."""
ELEMENTS = 1 << 25
"""Weights in flight: experts are taken in portions of about so many."""


@dataclass(frozen=True)
class BalanceLayer:
    """A weight that reads the tensor to be scaled, and what an error in it costs.

    weight: fp32 [E, N, K]. cost: fp32 [E, K, K], a metric, or [E, K], a price for each input. gram: of its inputs.
    quant: what it will become.
    """

    weight: Tensor
    cost: Tensor
    gram: Gram
    quant: QuantConfig


@dataclass(frozen=True)
class ChannelScales:
    """scales: fp32 [E, C], one for each channel of what makes the inputs. exponents: fp64 [E]. E = 1 where shared."""

    scales: Tensor
    exponents: Tensor

    def to(self, device: torch.device | str) -> ChannelScales:
        """The same on a device."""
        return ChannelScales(self.scales.to(device), self.exponents.to(device))


@dataclass(frozen=True)
class Scaling:
    """What happens to the weight of one site: W' = W * inputs / rows.

    inputs: fp32 [E, K], the scales of its inputs. rows: fp32 [E, N], the scales of what its outputs are read by; both
    [1, ...] where all experts share them. exponent: rho, the mean over experts. unscaled: why the inputs stay as they
    are, or None.
    """

    inputs: Tensor
    rows: Tensor
    exponent: float = 0.0
    unscaled: str | None = None

    def apply(self, weight: Tensor) -> Tensor:
        """W' for a weight [E, N, K]."""
        return weight * self.inputs[:, None, :] / self.rows[:, :, None]

    def undo(self, weight: Tensor) -> Tensor:
        """W for a W'."""
        return weight * self.rows[:, :, None] / self.inputs[:, None, :]

    def rows_at(self, index: Tensor) -> Scaling:
        """The scaling of the rows `index` (int64) alone."""
        return replace(self, rows=self.rows[:, index])

    def hessian(self, hessian: Tensor) -> Tensor:
        """S^-1 metric S^-1: what the metric [E, K, K] of the original inputs is for the scaled ones."""
        return hessian / self.inputs[:, :, None] / self.inputs[:, None, :]


def search(
    balance_layers: Sequence[BalanceLayer],
    scale_dtype: torch.dtype,
    *,
    shared: bool,
    binary: bool,
    source: Tensor | None = None,
    channels: int = 0,
) -> ChannelScales:
    """The best scales for a tensor that `balance_layers` read.

    shared: one scale for all readers and their experts, chosen by the sum of their losses, each expert's times its
    rows; otherwise there is one reader and each expert has its own. binary: scales are powers of two.
    source: int64 [K], which of `channels` channels is behind each input, where inputs share channels and so scales;
    None where each input is a channel. Losses that tie go to the smaller exponent.
    """
    sums = [(balance_layer.gram.abs_sum, balance_layer.gram.rows) for balance_layer in balance_layers]
    if shared:
        total = torch.stack([magnitude.sum(0) for magnitude, _ in sums]).sum(0, keepdim=True)
        seen = torch.stack([rows.sum() for _, rows in sums]).sum().reshape(1)
    else:
        total, seen = sums[0]
    magnitude = total / seen.clamp(min=1)[:, None]
    if source is not None:
        magnitude = _by_channel(magnitude, source, channels)
    candidates = EXPONENTS if balance_layers[0].cost.dim() == 3 else SMALL_EXPONENTS
    tried = torch.stack([_scales(magnitude, exponent, binary) for exponent in candidates])  # [R, E, C]
    loss = torch.zeros(tried.shape[:2], dtype=torch.float64, device=tried.device)
    for balance_layer in balance_layers:
        own = _losses(balance_layer, tried if source is None else tried[:, :, source], scale_dtype)
        loss += (own * balance_layer.gram.rows).sum(1, keepdim=True) if shared else own
    best = loss.argmin(0)
    exponents = torch.tensor(candidates, dtype=torch.float64, device=best.device)[best]
    return ChannelScales(tried[best, torch.arange(len(best), device=best.device)], exponents)


def _by_channel(magnitude: Tensor, source: Tensor, channels: int) -> Tensor:
    """Mean magnitude [E, C] over the inputs [E, K] that follow each channel; 0 where none does."""
    follows = torch.nn.functional.one_hot(source, channels).to(
        magnitude.dtype
    )  # its sums have one order, unlike index_add
    return magnitude @ follows / follows.sum(0).clamp(min=1)


def _scales(magnitude: Tensor, exponent: float, binary: bool) -> Tensor:
    """s for one exponent, [E, C]; ones for an expert that has seen nothing."""
    mean = magnitude.mean(1, keepdim=True)
    relative = torch.where(mean > 0, magnitude / mean.clamp(min=torch.finfo(mean.dtype).tiny), 1.0)
    scales = relative.clamp(min=FLOOR) ** exponent
    scales = scales / (scales.amax(1, keepdim=True) * scales.amin(1, keepdim=True)).sqrt()
    return scales.log2().round().exp2() if binary else scales


def _losses(balance_layer: BalanceLayer, tried: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """The loss of every candidate [R, E or 1, K], fp64 [R, E]: summed over rows, a sample standing for all of them."""
    experts, rows, columns = balance_layer.weight.shape
    quant = balance_layer.quant
    group_size = quant.columns_per_group(columns)
    rule = GridRule(quant.bits, quant.sym, balance_layer.cost.dim() == 2, scale_dtype)
    most = PRICED_VOTERS if rule.search else VOTERS
    voters = torch.arange(0, rows, -(-rows // most), device=balance_layer.weight.device)
    loss = torch.empty((len(tried), experts), dtype=torch.float64, device=tried.device)
    portion = max(1, ELEMENTS // (len(voters) * columns))
    for first in range(0, experts, portion):
        at = slice(first, first + portion)
        weight, cost = balance_layer.weight[at, voters], balance_layer.cost[at]
        for index, scales in enumerate(tried):
            own = scales[at if len(scales) > 1 else slice(None)].unsqueeze(1)
            if rule.search:
                error = searched_error(weight * own, cost / own.squeeze(1).square(), rule, group_size) / own
                dear = error * cost.unsqueeze(1)
            else:
                error = minmax_error(weight * own, rule, group_size) / own
                dear = error @ cost
            loss[index, at] = dear.mul_(error).sum(-1).sum(-1, dtype=torch.float64)
    return loss * (rows / len(voters))

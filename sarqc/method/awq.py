"""AWQ channel scales: salient inputs get finer steps, by a search that needs only the Gram.

Multiplying input j of a weight by s_j and dividing the layer that makes that input by s_j changes nothing before
quantization. After it, a large s_j makes the steps of input j finer, at the cost of its group. The candidates are
powers of the mean magnitude of the input (arXiv 2306.00978):

    s_j = a_j^rho / sqrt(max a^rho * min a^rho),    a_j = E|x_j|,    rho = 0, 0.05 .. 0.95

They are compared by the error E = W - Q(W S) S^-1 of RTN. Errors are measured in the original space, so the regulariser
needs no scales. rho = 0, the identity, is a candidate, so the choice is never worse than no scales in this measure:

- tr(E (H + lambda D) E^T) with min-max scales, where RTN follows: AWQ;
- sum_j M_jj^2 |E_j|^2 with M M^T = H + lambda D and searched scales, where GPTQ follows: the error of column j costs
  that much after the later columns have corrected what they can.

Searched scales leave channel scales less to gain, so rho = 0, 0.1 .. 0.5 is enough; with min-max scales the choice goes
too far and makes models worse.
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
"""Rows of each matrix that a candidate is measured on, evenly spaced, with a Hessian and with loss weights; all rows
would cost as much as quantizing.
"""
FLOOR = 1e-2
"""Least a_j relative to the mean, so that inputs that calibration never excited keep distinct weights."""
ELEMENTS = 1 << 25
"""Weights in flight: experts are taken in chunks of about this many."""


@dataclass(frozen=True)
class BalanceLayer:
    """A weight that reads the tensor to be scaled.

    Attributes:
        weight: fp32 [E, N, K].
        cost: A Hessian, fp32 [E, K, K], or a loss weight of each input, [E, K].
        gram: Of its inputs.
        quant: Its number format.
    """

    weight: Tensor
    cost: Tensor
    gram: Gram
    quant: QuantConfig


@dataclass(frozen=True)
class ChannelScales:
    """scales: fp32 [E, C], one for each channel of the smooth layer. exponents: fp64 [E]. E = 1 where shared."""

    scales: Tensor
    exponents: Tensor

    def to(self, device: torch.device | str) -> ChannelScales:
        """The same on a device."""
        return ChannelScales(self.scales.to(device), self.exponents.to(device))


@dataclass(frozen=True)
class Scaling:
    """The scaling of the weight of one site: W' = W * inputs / rows.

    Attributes:
        inputs: Scales of its inputs, fp32 [E, K], or [1, K] where all experts share them.
        rows: Scales of the layers that read its outputs, fp32 [E, N] or [1, N].
        exponent: rho, the mean over experts.
        unscaled: Why the inputs are not scaled, or None.
    """

    inputs: Tensor
    rows: Tensor
    exponent: float = 0.0
    unscaled: str | None = None

    def apply(self, weight: Tensor) -> Tensor:
        """W' for a `weight` [E, N, K]."""
        return weight * self.inputs[:, None, :] / self.rows[:, :, None]

    def undo(self, weight: Tensor) -> Tensor:
        """W for a scaled `weight` W' [E, N, K]."""
        return weight * self.rows[:, :, None] / self.inputs[:, None, :]

    def rows_at(self, index: Tensor) -> Scaling:
        """The scaling of the rows `index` (int64) only."""
        return replace(self, rows=self.rows[:, index])

    def hessian(self, hessian: Tensor) -> Tensor:
        """S^-1 H S^-1 of a `hessian` [E, K, K]: that of the scaled inputs."""
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
    """The best scales for a tensor that `balance_layers` read. Ties go to the smaller exponent.

    Args:
        balance_layers: Layers that read it.
        scale_dtype: Dtype that quantization scales are stored in.
        shared: One scale for all layers and their experts, chosen by the sum of their losses, each expert's times its
            rows. Otherwise there is one layer and each expert has its own.
        binary: Round scales to powers of two.
        source: int64 [K], the channel behind each input, where inputs share channels and so scales; None where each
            input is a channel.
        channels: Number of channels where `source` is given.
    """
    grams = [balance_layer.gram for balance_layer in balance_layers]
    if shared:
        total = torch.stack([gram.abs_sum.sum(0) for gram in grams]).sum(0, keepdim=True)
        seen = torch.stack([gram.rows.sum() for gram in grams]).sum()
        magnitude = total / seen.clamp(min=1)
    else:
        magnitude = grams[0].abs_mean()
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
    """The loss of every candidate [R, E or 1, K], fp64 [R, E], on a sample of rows."""
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

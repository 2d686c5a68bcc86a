"""`coordinate_descent` in plain torch: the readable twin of every faster implementation.

Layout. As in `reference.py`, buffers are [K, E, N], so a column of all rows of all experts is one contiguous vector.
Rows are padded to whole vectors, because torch adds the last columns of a sum in another order (`grid.py`).

State. `levels` are code - zero; `gradient` is (E H)^T with E = W - Q, kept up to date. A group reads its own columns
of it and, where its weights change by D, takes D H_g away from all columns. A pass costs one product with a K x K
matrix; everything else is local to a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sarqc_kernels.columns.grid import LANES, levels_of
from sarqc_kernels.columns.reference import DEPTH, MICRO
from sarqc_kernels.products import columns_product

__all__ = ["REACH", "State", "coordinate_descent", "usable_experts"]

REACH = 2.0
"""A scale changes by less than this factor at once. One that would change more is of weights that hardly matter."""


@dataclass
class State:
    """Buffers of a call, rows padded. Experts that are not usable keep what they have."""

    levels: Tensor  # fp32 [K, E, N]
    scales: Tensor  # fp32 [G, E, N]
    zeros: Tensor  # fp32 [G, E, N]
    gradient: Tensor  # fp32 [K, E, N]; E^T at first
    hessian: Tensor  # fp32 [E, K, K]
    usable: Tensor  # bool [E]
    top: int
    scale_dtype: torch.dtype

    @property
    def group_size(self) -> int:
        """Columns of a group."""
        return len(self.levels) // len(self.scales)

    def results(self, rows: int) -> tuple[Tensor, Tensor]:
        """Codes uint8 [E, N, K] and scales [E, N, G] of the rows that are not padding."""
        codes = (self.levels.unflatten(0, (-1, self.group_size)) + self.zeros[:, None]).flatten(0, 1)[..., :rows]
        scales = self.scales[..., :rows].permute(1, 2, 0).to(self.scale_dtype)
        return codes.to(torch.uint8).permute(1, 2, 0).contiguous(), scales.contiguous()


def initial_state(weight: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, hessian: Tensor, bits: int) -> State:
    """The buffers of a call, with E^T in the place of the gradient."""

    def across(tensor: Tensor, fill: float) -> Tensor:
        moved, missing = tensor.permute(2, 0, 1).float(), -tensor.shape[1] % LANES
        return (F.pad(moved, (0, missing), value=fill) if missing else moved).contiguous()

    size = weight.shape[2] // scales.shape[2]
    scale, zero = across(scales, 1.0), across(zeros, 0.0)
    levels = (across(codes, 0.0).unflatten(0, (-1, size)) - zero[:, None]).flatten(0, 1)
    error = across(weight, 0.0) - (levels.unflatten(0, (-1, size)) * scale[:, None]).flatten(0, 1)
    return State(levels, scale, zero, error, hessian, usable_experts(hessian), (1 << bits) - 1, scales.dtype)


def usable_experts(hessian: Tensor) -> Tensor:
    """Which experts have a Hessian, bool [E]: those with a finite, positive diagonal."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    return (diagonal.isfinite() & (diagonal > 0)).all(1)


def _add_product_(out: Tensor, hessian: Tensor, change: Tensor, sign: float = 1.0) -> None:
    """out [J, E, N] += sign * H^T change, of hessian [E, I, J] and change [I, E, N], `DEPTH` columns at a time."""
    for expert in range(out.shape[1]):
        for first in range(0, len(change), DEPTH):
            part = slice(first, first + DEPTH)
            out[:, expert].add_(columns_product(hessian[expert, part], change[part, expert]), alpha=sign)


def coordinate_descent(
    weight: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, hessian: Tensor, bits: int, passes: int
) -> tuple[Tensor, Tensor]:
    """Reference of `sarqc_kernels.columns.coordinate_descent`."""
    state = initial_state(weight, codes, scales, zeros, hessian, bits)
    size, error = state.group_size, state.gradient
    state.gradient = torch.zeros_like(error)
    _add_product_(state.gradient, hessian, error)
    for _ in range(passes):
        for group in range(len(state.scales)):
            at = slice(group * size, (group + 1) * size)
            _add_product_(state.gradient, hessian[:, at], _improve(state, group, at), sign=-1.0)
    return state.results(weight.shape[1])


def _improve(state: State, group: int, at: slice) -> Tensor:
    """Better codes and then a better scale of one group; the change of its weights, fp32 [g, E, N].

    With the change D of the group's weights the loss falls by D (2 E H)_g^T - D H_gg D^T. `rest` is (E H)_g after the
    codes changed, `curved` is L H_gg, so D H_gg is gradient - rest + (new - old) * curved.
    """
    square, gradient, old = state.hessian[:, at, at], state.gradient[at], state.scales[group]
    before = state.levels[at] * old
    levels, rest = _better_codes(state, group, at, before)
    curved = torch.zeros_like(gradient)
    _add_product_(curved, square, levels)
    new = (old + (levels * rest).sum(0) / (levels * curved).sum(0)).to(state.scale_dtype).float()
    growth = new / old
    new = torch.where((growth > 1 / REACH) & (growth < REACH), new, old)  # not so for NaN, which a group of zeros gives
    change = levels * new - before
    saved = (change * (gradient + rest - (new - old) * curved)).sum(0)
    better = (saved > 0) & state.usable[:, None]
    state.scales[group] = torch.where(better, new, old)
    state.levels[at] = torch.where(better, levels, state.levels[at])
    return torch.where(better, change, 0.0)


def _better_codes(state: State, group: int, at: slice, before: Tensor) -> tuple[Tensor, Tensor]:
    """Levels of a group's columns, each the best while all others keep theirs, and (E H)_g after that."""
    square = state.hessian[:, at, at]
    diagonal = square.diagonal(dim1=1, dim2=2)
    rows, columns = square.unbind(0), torch.arange(len(before)).split(MICRO)
    coefficients = square.permute(1, 2, 0).unsqueeze(-1).contiguous()  # [i, j, E, 1]
    scale, low = state.scales[group], -state.zeros[group]
    levels, rest, delta = torch.empty_like(before), state.gradient[at].clone(), torch.empty_like(before[:MICRO])
    for micro in columns:
        start, stop = int(micro[0]), int(micro[-1]) + 1
        own = slice(start, stop)
        for j in range(start, stop):
            wanted = before[j] + rest[j] / diagonal[:, j, None]
            levels_of(wanted, scale, low, state.top + low, out=levels[j])
            torch.sub(before[j], levels[j] * scale, out=delta[j - start])
            rest[own].addcmul_(coefficients[j, own], delta[j - start])
        for others in (slice(0, start), slice(stop, len(before))):
            if others.start < others.stop:
                for expert, matrix in enumerate(rows):
                    rest[others, expert] += columns_product(matrix[own, others], delta[: stop - start, expert])
    return levels, rest

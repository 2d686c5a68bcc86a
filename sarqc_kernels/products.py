"""Matrix products on a CPU whose sums have an order of the program's own.

BLAS chooses a kernel, and with it the order of a sum, by the shape of the whole product. On some processors (MKL on
AMD) a row then gets other bits beside other rows. Here products are cut into panels of `PANEL` rows, padded with zeros,
so that BLAS meets one shape for a given matrix. A row's result is then the same whatever layers are concatenated,
experts batched or rows split over processes.

What is promised: equal results for equal rows on one machine with one build of torch. Another processor may sum in
another order. On a GPU the kernels of this package fix the order themselves, and these functions call torch's product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PANEL", "columns_product", "rows_product", "solve_columns", "solve_rows"]

PANEL = 64
"""Rows, or columns of `columns_product` and `solve_columns`, of one product."""
MULTIPLE = 16
"""The other width is padded to a multiple of this: BLAS has routines of another order for widths of one or two."""


def columns_product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, fp32 [w, n], of left [a, w] and right [a, n]. A column depends on its own column of `right`."""
    if left.device.type != "cpu":
        return left.T @ right
    width, count = left.shape[1], right.shape[1]
    panels = _padded(right, PANEL).unflatten(1, (-1, PANEL)).transpose(0, 1)
    wide = _padded(left, MULTIPLE).T.expand(len(panels), -1, -1)
    return torch.bmm(wide, panels).transpose(0, 1).flatten(1)[:width, :count]


def rows_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows @ matrix, fp32 [E, N, J], of rows [E, N, K] and matrix [E, K, J]. A row depends on its own row alone."""
    if rows.device.type != "cpu":
        return rows @ matrix
    panels, wide = _panels(rows), _padded(matrix, MULTIPLE)
    if len(panels) == 1:  # a dense layer: its panels are the batch
        product = torch.bmm(panels[0], wide.expand(panels.shape[1], -1, -1)).unsqueeze(0)
    else:
        product = torch.stack([torch.bmm(panel, wide) for panel in panels.unbind(1)], 1)
    return product.flatten(1, 2)[:, : rows.shape[1], : matrix.shape[2]]


def solve_columns(lower: Tensor, right: Tensor) -> Tensor:
    """X [a, n] with lower X = right [a, n], for a unit lower triangle [a, a]. A column depends on its own alone."""
    solved: Tensor
    if right.device.type != "cpu":
        solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
        return solved
    panels = _padded(right, PANEL).unflatten(1, (-1, PANEL)).transpose(0, 1)
    solved = torch.linalg.solve_triangular(lower, panels, upper=False, unitriangular=True)
    return solved.transpose(0, 1).flatten(1)[:, : right.shape[1]]


def solve_rows(upper: Tensor, rows: Tensor) -> Tensor:
    """X [E, N, K] with X upper = rows [E, N, K], for upper triangles [E, K, K]. A row depends on its own row alone."""
    solved: Tensor
    if rows.device.type != "cpu":
        solved = torch.linalg.solve_triangular(upper, rows, upper=True, left=False)
        return solved
    solved = torch.linalg.solve_triangular(upper.unsqueeze(1), _panels(rows), upper=True, left=False)
    return solved.flatten(1, 2)[:, : rows.shape[1]]


def _panels(rows: Tensor) -> Tensor:
    """[E, N, K] as [E, P, PANEL, K], with rows of zeros behind the last."""
    padded: Tensor = F.pad(rows, (0, 0, 0, -rows.shape[1] % PANEL))
    panels: Tensor = padded.unflatten(1, (-1, PANEL))  # torch leaves it without a type
    return panels


def _padded(matrix: Tensor, multiple: int) -> Tensor:
    """A matrix with columns of zeros behind its last, up to a `multiple`."""
    missing = -matrix.shape[-1] % multiple
    return F.pad(matrix, (0, missing)) if missing else matrix

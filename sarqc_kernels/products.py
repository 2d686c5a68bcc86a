"""Matrix products on a CPU whose sums have an order of the program's own.

BLAS chooses a kernel, and with it the order of a sum, by the shape of the whole product. On some processors (MKL on
AMD) a column then gets other bits beside other columns. Here products are cut into panels of `PANEL` columns, padded
with zeros, so that BLAS meets one shape for a given matrix. A column's result is then the same whatever layers are
concatenated, experts batched or rows of a weight split over processes.

What is promised: equal results for equal columns on one machine with one build of torch. Another processor may sum in
another order. On a GPU the kernels of this package fix the order themselves, and this function calls torch's product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PANEL", "columns_product"]

PANEL = 64
"""Columns of one product."""
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


def _padded(matrix: Tensor, multiple: int) -> Tensor:
    """A matrix with columns of zeros behind its last, up to a `multiple`."""
    missing = -matrix.shape[-1] % multiple
    return F.pad(matrix, (0, missing)) if missing else matrix

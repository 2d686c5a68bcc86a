"""The order in which columns are rounded: the ones that matter most first, while most others can still correct them."""

from __future__ import annotations

from torch import Tensor

from sarqc.spec import Order


def column_order(diagonal: Tensor, group_size: int, order: Order) -> Tensor | None:
    """The order [E, K] int64 of columns by falling `diagonal` [E, K], or None for the order they have.

    "static" sorts all columns. "group" sorts groups by their sum and columns inside each group, so that a group's
    columns stay together and its grid can be fitted when the solver reaches it (arXiv 2505.14638). Ties keep their
    order, so equal input gives equal output.
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

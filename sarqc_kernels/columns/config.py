"""Tiles of the device kernels: a pure function of the shape, the card and a committed table (`tuned.py`) where there is
one. Nothing is measured at run time, so codes do not depend on it.

Two kernels have tiles. The panel product is a GEMM of few columns (a panel) by all rows: small tiles spread a dense
layer of some thousand rows over the card, large ones read less when experts make enough of them. The column kernel
gives every row a thread; a program of 32 rows (one warp) is the smallest there is, and 4096 rows are 128 of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sarqc_kernels.device import Device
from sarqc_kernels.errors import BackendError
from sarqc_kernels.tuned import bucket, choices

__all__ = ["MICRO", "PANEL", "Config", "choose", "key", "rule", "tiles"]

PANEL = 128
"""Columns between two products with everything before them."""

MICRO = 16
"""Columns whose errors a thread keeps in registers; unrolled, so the time to compile grows with their square."""


@dataclass(frozen=True)
class Config:
    """product_columns x product_rows: tile of the panel product, of `product_depth` columns at a time.

    rows: rows of a column program, 32 to a warp.
    """

    product_columns: int
    product_rows: int
    product_depth: int
    product_warps: int
    product_stages: int
    rows: int

    @property
    def warps(self) -> int:
        """Warps of a column program: every row has a thread of its own."""
        return self.rows // 32


_FEW_ROWS = Config(64, 64, 32, 4, 3, 32)
_MANY_ROWS = Config(128, 128, 32, 8, 3, 128)


def tiles(card: Device) -> dict[str, Config]:
    """Everything that `choose` can return for a card, by the names of its table."""
    # ptxas spills the wide tile of odd sizes on sm_120
    many = replace(_MANY_ROWS, product_rows=64) if card.arch >= 120 else _MANY_ROWS
    return {"few rows": _FEW_ROWS, "many rows": many}


def key(experts: int, rows: int) -> str:
    """Of a call in the table; sizes by powers of two."""
    return f"e{bucket(experts)} n{bucket(rows)}"


def choose(experts: int, rows: int, card: Device) -> Config:
    """The tiles for `experts` weights of `rows` rows."""
    if measured := choices("columns", card.arch).get(key(experts, rows)):
        if measured["tiles"] not in tiles(card):
            raise BackendError(f"the columns table of sm_{card.arch} names {measured['tiles']!r}: run benchmarks.tune")
        return tiles(card)[measured["tiles"]]
    return rule(experts, rows, card)


def rule(experts: int, rows: int, card: Device) -> Config:
    """The tiles of a call that no table has."""
    few, many = tiles(card).values()
    programs = experts * -(-rows // many.rows) * (PANEL // many.product_columns)
    return many if programs >= 2 * card.multiprocessors else few

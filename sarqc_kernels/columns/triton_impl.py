"""`quantize_columns` in Triton: the steps of `panels.py` as three kernels.

    _pull       panel product: a GEMM of M^T and Delta by tiles, on tensor cores as three TF32 products (tf32x3), which
                keeps 21 bits of each factor: one TF32 product keeps 10, an error in p_j of a few hundredths of a
                step where sums are some tens of steps. (torch.bmm would do as well, but follows a global TF32 flag.)
    _columns    a program owns `ROWS` rows of one expert, a thread one row. For every micro-panel of 16 columns it adds
                what earlier columns of the panel ask (tile products), leaves that in a scratch that only it sees, and
                takes the columns one by one, unrolled, the errors of the micro-panel in registers. Fitted grids: each
                group is walked free, fitted and walked again.
    fit_wide    (`grid_impl.py`) the fit of a group that is wider than a panel.

Bytes and flops for an expert's panel of P columns that begins at column b: `_pull` reads 4 b (P + N) bytes at least and
does 2 b P N flops, three times that in TF32. `_columns` reads and writes some 25 P N bytes of memory once, 4 P N P / 32
of earlier errors from cache, and does P^2 N flops; a fit doubles that and adds, for each of 24 trials, 8 P N bytes from
cache and 8 P N flops.

Rounding is the reference's, operation for operation: IEEE division, half to even, a product and a sum in one step only
where `tl.fma` says so. Sums differ: their order, and that M is divided out at their end. So codes can differ within a
few units in the last place of the middle between two, and fitted scales where two trials of the search are that close.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005  (Triton joins tuples by +)
# (Triton's kernels take no annotations but tl.constexpr.)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sarqc_kernels.columns.config import MICRO, PANEL, Config, choose
from sarqc_kernels.columns.grid import TRIALS, GridRule, Problem
from sarqc_kernels.columns.grid_impl import clamped, fit, fit_wide, half_even
from sarqc_kernels.columns.panels import Action, Work, factors_of, quantize
from sarqc_kernels.device import FUSED, device_info

__all__ = ["CHUNK", "OPTIONS", "Steps", "kind_of", "limits", "quantize_columns"]

CHUNK = 16
"""Columns of a group that the fit takes at once."""

DEPTH = 32
"""Columns of the panel that `_columns` brings in at once."""

SCALES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _add_pull(acc, factor, delta, begin, end, column, live_column, row, live_row, rows, stride, DEPTH: tl.constexpr):
    """acc [columns, rows] + sum over begin <= i < end of M[i, column] delta[i, row]."""
    line = factor + tl.cast(begin, tl.int64) * stride  # a factor can have more than 2^31 elements
    within = tl.arange(0, DEPTH)[:, None] * stride + column[None, :]
    for start in range(begin, end, DEPTH):
        i = start + tl.arange(0, DEPTH)
        live = (i < end)[:, None]
        m = tl.load(line + within, mask=live & live_column[None, :], other=0.0)
        line += DEPTH * stride
        d = tl.load(delta + i[:, None] * rows + row[None, :], mask=live & live_row[None, :], other=0.0)
        acc = tl.dot(tl.trans(m), d, acc, input_precision="tf32x3")
    return acc


@triton.jit(do_not_specialize=["last"])
def _pull(
    pull, delta, factor, usable, first, last, rows, columns, factor_expert,
    PANEL: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """pull[e, j - first, n] = sum over i < first of M[e, i, j] delta[e, i, n] for first <= j < last."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = first + tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    live_row, live_column = row < rows, column < last
    depth = tl.where(tl.load(usable + expert) != 0, first, 0)
    acc = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    acc = _add_pull(acc, factor + expert * factor_expert, delta + expert * columns * rows, 0, depth,
                    column, live_column, row, live_row, rows, columns, DEPTH)  # fmt: skip
    out = pull + expert * PANEL * rows + (column - first)[:, None] * rows + row[None, :]
    tl.store(out, acc, mask=live_column[:, None] & live_row[None, :])


@triton.jit
def _batch(panel, lanes, start, end, errors, ROUND: tl.constexpr, BATCH: tl.constexpr):
    """Errors of columns start + len(errors) .. of a micro-panel; `errors` are of those before, from `start` on.

    All that the columns need is loaded before the first is taken, and what they give is stored after the last: a load
    behind a store has to wait for it.
    """
    weight, delta, codes, ahead, factor, inverse, group_of, scales, zeros = panel
    row, live, good, rows, columns, top = lanes
    BEFORE: tl.constexpr = len(errors)
    asked, corner, inverses, values, steps, middles = (), (), (), (), (), ()
    for k in tl.static_range(BATCH):
        j = start + BEFORE + k
        inside = j < end
        inverses = inverses + (tl.load(inverse + j, mask=inside, other=0.0),)
        for i in tl.static_range(k):
            corner = corner + (tl.load(factor + (start + BEFORE + i) * columns + j, mask=inside & good, other=0.0),)
        if ROUND:
            both = live & inside
            group = tl.load(group_of + j, mask=inside, other=0)
            values = values + (tl.load(weight + j * rows + row, mask=both, other=0.0),)
            steps = steps + (tl.load(scales + group * rows + row, mask=both, other=1.0),)
            middles = middles + (tl.load(zeros + group * rows + row, mask=both, other=0.0),)
        total = tl.load(ahead + (BEFORE + k) * rows + row, mask=live, other=0.0)
        for i in tl.static_range(BEFORE):
            m = tl.load(factor + (start + i) * columns + j, mask=inside & good, other=0.0)
            total = tl.fma(errors[i], m, total)
        asked = asked + (total,)
    deltas, levels = (), ()
    for k in tl.static_range(BATCH):
        total = asked[k]
        for i in tl.static_range(k):
            total = tl.fma(deltas[i], corner[k * (k - 1) // 2 + i], total)
        moved = total * inverses[k]
        if ROUND:
            level = clamped(half_even(tl.div_rn(values[k] + moved, steps[k])), -middles[k], top - middles[k])
            deltas = deltas + (values[k] - level * steps[k],)
            levels = levels + (level + middles[k],)
        else:
            deltas = deltas + (-moved,)
    for k in tl.static_range(BATCH):
        j = start + BEFORE + k
        both = live & (j < end)
        tl.store(delta + j * rows + row, deltas[k], mask=both)
        if ROUND:
            tl.store(codes + j * rows + row, levels[k].to(tl.int32).to(tl.uint8), mask=both)
    return errors + deltas


@triton.jit
def _micro_panel(panel, lanes, start, end, ROUND: tl.constexpr, MICRO: tl.constexpr):
    """Columns start .. min(start + MICRO, end) - 1, one by one; `ahead` holds what the columns before them ask."""
    errors = _batch(panel, lanes, start, end, (), ROUND, MICRO // 2)
    for _ in tl.static_range(2):  # two halves spill where grids are fitted too
        errors = _batch(panel, lanes, start, end, errors, ROUND, MICRO // 4)


@triton.jit
def _advance(panel, pull, lanes, begin, end, ROUND: tl.constexpr, MICRO: tl.constexpr, DEPTH: tl.constexpr):
    """Columns begin .. end - 1 of the panel. What a tile wrote other threads read: hence the barriers.

    panel: (weight, delta, codes, ahead, factor, inverse, group_of, scales, zeros), where it begins. lanes: (row, which
    rows there are, whether there is a factor, rows, columns, top).
    """
    delta, ahead, factor = panel[1], panel[3], panel[4]
    row, live, good, rows, columns, _ = lanes
    for start in range(begin, end, MICRO):
        k = tl.arange(0, MICRO)
        inside = start + k < end
        own = live[None, :] & inside[:, None]
        asked = tl.load(pull + (start + k)[:, None] * rows + row[None, :], mask=own, other=0.0)
        asked = _add_pull(asked, factor, delta, 0, tl.where(good, start, 0), start + k, inside, row, live, rows,
                          columns, DEPTH)  # fmt: skip
        tl.store(ahead + k[:, None] * rows + row[None, :], asked, mask=live[None, :] & (k >= 0)[:, None])
        tl.debug_barrier()
        _micro_panel(panel, lanes, start, end, ROUND, MICRO)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["last", "stretch"])
def _columns(
    weight, delta, codes, pull, ahead, factor, usable, inverse, importance, group_of, scales, zeros, table,
    first, last, stretch, rows, columns, groups, factor_expert, top, middle, tiny, most,
    ROUND: tl.constexpr, FIT: tl.constexpr, SYM: tl.constexpr, SEARCH: tl.constexpr, SCALE: tl.constexpr,
    TRIALS: tl.constexpr, ROWS: tl.constexpr, PANEL: tl.constexpr, MICRO: tl.constexpr, DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Columns first .. last - 1, in stretches (groups, if they are fitted); all pointers move to column `first`."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    good = tl.load(usable + expert) != 0
    matrix, vector = (expert * columns + first) * rows, expert * columns + first
    weight, delta, codes = weight + matrix, delta + matrix, codes + matrix
    pull, ahead = pull + expert * PANEL * rows, ahead + expert * MICRO * rows
    factor += expert * factor_expert + tl.cast(first, tl.int64) * columns + first
    inverse, importance, group_of = inverse + vector, importance + vector, group_of + vector
    scales, zeros = scales + expert * groups * rows, zeros + expert * groups * rows
    panel = (weight, delta, codes, ahead, factor, inverse, group_of, scales, zeros)
    lanes = (row, live, good, rows, columns, top)
    for begin in range(0, last - first, stretch):
        end = tl.minimum(begin + stretch, last - first)
        if FIT:
            _advance(panel, pull, lanes, begin, end, False, MICRO, DEPTH)
            scale, zero = fit((weight, delta, importance, table), begin, end, (row, live, rows),
                              (top, middle, tiny, most), SYM, SEARCH, SCALE, TRIALS, True, ROWS, CHUNK)  # fmt: skip
            group = tl.load(group_of + begin)
            tl.store(scales + group * rows + row, scale, mask=live)
            tl.store(zeros + group * rows + row, zero, mask=live)
            tl.debug_barrier()
        _advance(panel, pull, lanes, begin, end, ROUND, MICRO, DEPTH)


def quantize_columns(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """`sarqc_kernels.columns.quantize_columns` in Triton."""
    weight = problem.weight
    steps = Steps(choose(weight.shape[0], weight.shape[1], device_info(weight.device)))
    with torch.cuda.device_of(weight):
        return quantize(steps, problem)


@dataclass(frozen=True)
class Steps:
    """The steps of `panels.py`, launched on the current stream."""

    config: Config

    def pull(self, work: Work, first: int, last: int) -> None:
        """See `panels.Steps`."""
        own = self.config
        grid = (-(-work.rows // own.product_rows), work.experts, -(-(last - first) // own.product_columns))
        _pull[grid](
            work.pull, work.delta, work.factor, work.usable, first, last, work.rows, work.columns,
            work.factor.stride(0), PANEL=PANEL, COLUMNS=own.product_columns, ROWS=own.product_rows,
            DEPTH=own.product_depth, num_warps=own.product_warps, num_stages=own.product_stages, **FUSED,
        )  # fmt: skip

    def columns(self, work: Work, first: int, last: int, action: Action) -> None:
        """See `panels.Steps`."""
        own, fits = self.config, action == "fit"
        kind = kind_of(work.rule) if fits else _NO_FIT
        _columns[(-(-work.rows // own.rows), work.experts)](
            work.weight, work.delta, work.codes, work.pull, work.ahead, work.factor, work.usable, work.inverse,
            work.importance, work.group_of, work.scales, work.zeros, table=_table(work), first=first, last=last,
            stretch=work.group_size if fits else last - first, rows=work.rows, columns=work.columns,
            groups=work.scales.shape[1], factor_expert=work.factor.stride(0), **limits(work.rule),
            ROUND=action != "free", FIT=fits, **kind, ROWS=own.rows, PANEL=PANEL,
            MICRO=MICRO, DEPTH=DEPTH, CHUNK=CHUNK, num_warps=own.warps, **OPTIONS,
        )  # fmt: skip

    def fit(self, work: Work, first: int, last: int) -> None:
        """See `panels.Steps`."""
        own = self.config
        fit_wide[(-(-work.rows // own.rows), work.experts)](
            work.weight, work.delta, work.importance, work.group_of, work.scales, work.zeros, _table(work),
            first, last, work.rows, work.columns, work.scales.shape[1], **limits(work.rule), **kind_of(work.rule),
            ROWS=own.rows, CHUNK=CHUNK, num_warps=own.warps, **OPTIONS,
        )  # fmt: skip


OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}
"""Of the kernels that round. One stage: loads must not be moved ahead of the stores of the columns before them."""

_NO_FIT = {"SYM": True, "SEARCH": False, "SCALE": tl.float32, "TRIALS": TRIALS}


def kind_of(rule: GridRule) -> dict[str, Any]:
    """The compile-time arguments of a fit."""
    return {"SYM": rule.sym, "SEARCH": rule.search, "SCALE": SCALES[rule.scale_dtype], "TRIALS": TRIALS}


def limits(rule: GridRule) -> dict[str, float]:
    """The last code, its middle, and the least and most of a scale: arguments of a kernel that fits or rounds."""
    kept = torch.finfo(rule.scale_dtype)
    return {"top": float(rule.top), "middle": float(rule.middle), "tiny": kept.tiny, "most": kept.max}


def _table(work: Work) -> Tensor:
    return factors_of(work.rule.bits, work.rule.sym, work.weight.device)

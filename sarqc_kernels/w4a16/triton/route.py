"""The sort of choices by expert in one launch: a program for each expert counts what stands before its rows.

Counting sort without a second launch: program e reads all R choices twice. Those below e are the rows before its own;
those equal to e are its rows, in order. R E comparisons and 16 R E bytes from the L2 cache, 8 MB for 4096 tokens of
8 out of 16 experts each; nothing is exchanged between programs. A token's slot of a row is the number of its choices of
earlier experts. Deterministic: no atomics.
"""

# Triton reads the annotations of a kernel: those of run-time arguments have to be absent.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sarqc_kernels.device import FUSED, on_device

__all__ = ["route", "route_kernel"]

SIZE = 512  # choices at a time; 1024 spill
WARPS = 8  # with 4, ptxas puts a value of sm_80's kernel into local memory


@triton.jit(do_not_specialize=["count", "experts"])
def route_kernel(choices, weights, offsets, tokens, slots, sorted_weights, count, experts, TOP_K: tl.constexpr,
                 SIZE: tl.constexpr):  # fmt: skip
    """choices, weights: [count, TOP_K]. Item i = choice * count + token; see `Routing` for what is written."""
    expert = tl.program_id(0)
    items = count * TOP_K
    lane = tl.arange(0, SIZE)
    below = tl.zeros((SIZE,), dtype=tl.int32)
    for first in range(0, items, SIZE):
        item = first + lane
        chosen = tl.load(choices + item % count * TOP_K + item // count, mask=item < items, other=experts)
        below += (chosen < expert).to(tl.int32)
    row = tl.sum(below, 0)
    tl.store(offsets + expert, row.to(tl.int64))
    for first in range(0, items, SIZE):
        item = first + lane
        token = item % count
        choice = item // count
        chosen = tl.load(choices + token * TOP_K + choice, mask=item < items, other=experts)
        mine = chosen == expert
        own = mine.to(tl.int32)
        place = row + tl.cumsum(own, 0) - 1
        slot = tl.zeros((SIZE,), dtype=tl.int32)
        for other in tl.static_range(TOP_K):
            beside = tl.load(choices + token * TOP_K + other, mask=mine, other=0)
            slot += ((beside < expert) | ((beside == expert) & (other < choice))).to(tl.int32)
        tl.store(tokens + place, token.to(tl.int64), mask=mine)
        tl.store(slots + slot * count + token, place.to(tl.int64), mask=mine)
        tl.store(sorted_weights + place, tl.load(weights + token * TOP_K + choice, mask=mine), mask=mine)
        row += tl.sum(own, 0)
    if expert == experts - 1:
        tl.store(offsets + experts, row.to(tl.int64))


def route(choices: Tensor, weights: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `sarqc_kernels.w4a16.routing.route`."""
    count, top_k = choices.shape
    offsets, tokens = choices.new_empty((experts + 1,)), choices.new_empty((count * top_k,))
    slots, own = choices.new_empty((top_k, count)), weights.new_empty((count * top_k,))
    with on_device(choices):
        route_kernel[(experts,)](
            choices.contiguous(), weights.contiguous(), offsets, tokens, slots, own, count, experts, TOP_K=top_k,
            SIZE=min(SIZE, triton.next_power_of_2(max(16, count * top_k))), num_warps=WARPS, **FUSED,
        )  # fmt: skip
    return offsets, tokens, slots, own

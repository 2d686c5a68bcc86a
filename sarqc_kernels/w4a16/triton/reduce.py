"""What follows a product: partial sums of split inputs added up in order, and each token's sum over its experts."""

# Triton reads the annotations of a kernel: those of run-time arguments have to be absent.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

__all__ = ["combine_kernel", "silu_times", "sum_kernel"]


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up in fp32; where exp overflows, silu is 0 as it should be."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def added(parts, row, column, keep, rows, width, splits, SIZE: tl.constexpr):
    """Columns of one row of parts [splits, rows, width], added in order in fp32."""
    total = tl.zeros((SIZE,), dtype=tl.float32)
    part = parts + row.to(tl.int64) * width + column
    for _ in range(splits):
        total += tl.load(part, mask=keep, other=0.0).to(tl.float32)
        part += tl.cast(rows, tl.int64) * width
    return total


@triton.jit(do_not_specialize=["tokens"])
def sum_kernel(parts, offsets, out, tokens, outputs, splits, EXPERTS: tl.constexpr, GATED: tl.constexpr,
               SIZE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The split-K reduction: out [tokens, outputs] = the sum of parts [splits, tokens, width]; rows of no expert are 0.

    width is outputs; GATED: 2 * outputs, gate before up, and out is silu(gate) * up of the sums. PDL (programmatic
    dependent launch): the launch overlaps with the product, and the kernel waits for its end before it reads.
    """
    if PDL:
        gdc_wait()
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    token = tl.program_id(0)
    keep = column < outputs
    if EXPERTS > 0:
        keep = keep & (token >= tl.load(offsets)) & (token < tl.load(offsets + EXPERTS))
    if GATED:
        gate = added(parts, token, column, keep, tokens, outputs * 2, splits, SIZE)
        up = added(parts, token, column + outputs, keep, tokens, outputs * 2, splits, SIZE)
        total = silu_times(gate, up)
    else:
        total = added(parts, token, column, keep, tokens, outputs, splits, SIZE)
    tl.store(out + token.to(tl.int64) * outputs + column, total.to(out.dtype.element_ty), mask=column < outputs)


@triton.jit(do_not_specialize=["tokens", "rows"])
def combine_kernel(parts, slots, weights, out, tokens, rows, outputs, splits, CHOICES: tl.constexpr,
                   SIZE: tl.constexpr):  # fmt: skip
    """out [tokens, outputs]: each token's rows of parts [splits, rows, outputs], times their router weights, added up.

    slots: int64 [CHOICES, tokens], rows of a token in the order in which they are added. weights: [rows].
    """
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    token = tl.program_id(0)
    keep = column < outputs
    total = tl.zeros((SIZE,), dtype=tl.float32)
    for choice in range(CHOICES):
        row = tl.load(slots + choice * tl.cast(tokens, tl.int64) + token)
        total += tl.load(weights + row).to(tl.float32) * added(parts, row, column, keep, rows, outputs, splits, SIZE)
    tl.store(out + token.to(tl.int64) * outputs + column, total.to(out.dtype.element_ty), mask=keep)

"""The Triton kernels of W4A16, all on bricks (see `layout`). `triton_impl` launches them.

What they share: codes become 16-bit floats without a conversion. A code OR-ed into the bits of a constant whose last
mantissa bit counts 1 is the number constant + code: 0x4300 is 128 in bf16, 0x6400 is 1024 in fp16. Subtracting
constant + zero, itself exact, leaves code - zero, an integer of at most 15: exact in either dtype. Dots are then sums
of exact integers times activations in fp32, and the scale of a group multiplies the fp32 sum once. So a weight is never
rounded to 16 bits at all, and one that meets an activation of 1 comes out as (code - zero) * scale, rounded once.

Brick b of a row block starts at word 1024 b; a tile takes consecutive row blocks; rows and inputs are padded in the
layout, so loads of weights, scales and zeros need no mask. `locate` finds a program's tile of tokens among ragged
experts from `offsets` in registers: no list of tiles is built, nothing waits for the device.
"""

# Triton reads the annotations of a kernel: those of run-time arguments have to be absent.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["dot_kernel", "expand_kernel", "gemv_kernel", "sum_kernel"]


@triton.jit
def centered(codes, zeros, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """code - zero, exactly, in DTYPE (bf16 or fp16); both are int32 below 16."""
    magic: tl.constexpr = 0x4300 if DTYPE == tl.bfloat16 else 0x6400  # noqa: SIM300
    weight = (codes | magic).to(tl.int16).to(DTYPE, bitcast=True)
    zero = (zeros | magic).to(tl.int16).to(DTYPE, bitcast=True)
    if INTERPRETED:  # which has no arithmetic on bf16
        return (weight.to(tl.float32) - zero.to(tl.float32)).to(DTYPE)
    return weight - zero


@triton.jit
def locate(offsets, block, tokens, EXPERTS: tl.constexpr, SPAN: tl.constexpr, SIZE: tl.constexpr):
    """(expert, first row, row behind the last of the expert) of the `block`-th tile of SIZE rows.

    expert = EXPERTS where there is no such tile. SPAN: a power of two, at least EXPERTS.
    """
    if EXPERTS == 0:
        return 0, block * SIZE, tokens
    expert = tl.arange(0, SPAN)
    begin = tl.load(offsets + expert, mask=expert < EXPERTS, other=0).to(tl.int32)
    end = tl.load(offsets + expert + 1, mask=expert < EXPERTS, other=0).to(tl.int32)
    tiles = (end - begin + SIZE - 1) // SIZE
    upto = tl.cumsum(tiles, 0)
    mine = (block >= upto - tiles) & (block < upto)  # of at most one expert
    found = tl.sum(tl.where(mine, expert, 0), 0)
    first = tl.sum(tl.where(mine, begin + (block - upto + tiles) * SIZE, 0), 0)
    stop = tl.sum(tl.where(mine, end, 0), 0)
    any_tile = tl.sum(mine.to(tl.int32), 0)
    return tl.where(any_tile > 0, found, EXPERTS), first, stop


@triton.jit
def store(out, sums, rows, tokens, last, bias, expert, split, count,
          outputs, SPLIT: tl.constexpr, BIASED: tl.constexpr):  # fmt: skip
    """sums [rows, tokens] to out [splits, count, outputs], bias added in the first split."""
    keep = (rows < outputs)[:, None] & (tokens < last)[None, :]
    if BIASED:
        offset = tl.load(bias + expert * outputs + rows, mask=rows < outputs, other=0.0).to(tl.float32)
        sums += tl.where(split == 0, offset, 0.0)[:, None]
    place = tokens.to(tl.int64)
    if SPLIT:
        place += split.to(tl.int64) * count
    tl.store(out + place[None, :] * outputs + rows[:, None], sums.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["tokens"])
def dot_kernel(
    x, words, scales, zeros, offsets, bias, out, tokens, outputs, inputs, bricks, groups, bricks_per_group, padded,
    bricks_per_split, EXPERTS: tl.constexpr, SPAN: tl.constexpr, SUB: tl.constexpr, ASYMMETRIC: tl.constexpr,
    BIASED: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS of the weight, TOKENS] on the tensor cores, weights as first operand from registers.

    Grid (tiles of tokens, tiles of rows, splits): programs beside each other read the same weights. Eight dots of depth
    16 for each brick, one for each nibble; SUB groups to a brick, their sums scaled apart. WHOLE: inputs % 128 == 0.
    """
    expert, first, last = locate(offsets, tl.program_id(0), tokens, EXPERTS, SPAN, TOKENS)
    if EXPERTS > 0:  # noqa: SIM102  (known when compiled; the next line is not)
        if expert == EXPERTS:
            return
    expert = tl.cast(expert, tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = first + tl.arange(0, TOKENS)
    depth = tl.arange(0, 16)
    word = words + expert * bricks * padded * 16
    word += ((rows // 64) * (bricks * 1024) + (rows % 64) * 16)[:, None] + depth[None, :]
    scale_of, zero_of = scales + expert * groups * padded + rows, zeros + expert * groups * padded + rows
    active = x + token.to(tl.int64)[None, :] * inputs + depth[:, None]
    begin = tl.program_id(2) * bricks_per_split
    sums = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for brick in range(begin, tl.minimum(begin + bricks_per_split, bricks)):
        packed = tl.load(word + brick * 1024)
        for j in tl.static_range(SUB):
            group = (brick * SUB + j if SUB > 1 else brick // bricks_per_group) * padded
            scale = tl.load(scale_of + group).to(tl.float32)  # before the dots: they hide some of its latency
            zero = tl.load(zero_of + group).to(tl.int32) if ASYMMETRIC else tl.full((ROWS,), 8, tl.int32)
            part = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
            for i in tl.static_range(8 // SUB):
                nibble = j * (8 // SUB) + i
                start = brick * 128 + nibble * 16
                keep = (token < last)[None, :]
                if not WHOLE:
                    keep = keep & (start + depth < inputs)[:, None]
                act = tl.load(active + start, mask=keep, other=0.0)
                weight = centered((packed >> (4 * nibble)) & 15, zero[:, None], act.dtype, INTERPRETED)
                part = tl.dot(weight, act, part)
            sums += part * scale[:, None]
    store(out, sums, rows, token, last, bias, expert, tl.program_id(2), tokens, outputs, SPLIT, BIASED)


@triton.jit(do_not_specialize=["tokens"])
def gemv_kernel(
    x, words, scales, zeros, offsets, bias, out, tokens, outputs, inputs, bricks, groups, bricks_per_group, padded,
    bricks_per_split, EXPERTS: tl.constexpr, SPAN: tl.constexpr, SUB: tl.constexpr, ASYMMETRIC: tl.constexpr,
    BIASED: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One or two tokens: fp32 multiply-adds in place of the tensor core; arguments and grid as of `dot_kernel`.

    A step takes four bricks of ROWS rows, one word of eight weights for each of [ROWS, 4 x 16] places, and the loads of
    STAGES steps are under way at once. Lanes are added up only after the last step.
    """
    expert, first, last = locate(offsets, tl.program_id(0), tokens, EXPERTS, SPAN, TOKENS)
    if EXPERTS > 0:  # noqa: SIM102  (known when compiled; the next line is not)
        if expert == EXPERTS:
            return
    expert = tl.cast(expert, tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, 64)
    mine, depth = lane // 16, lane % 16
    word = words + expert * bricks * padded * 16
    word += ((rows // 64) * (bricks * 1024) + (rows % 64) * 16)[:, None] + (mine * 1024 + depth)[None, :]
    scale_of, zero_of = (
        scales + expert * groups * padded + rows[:, None],
        zeros + expert * groups * padded + rows[:, None],
    )
    begin = tl.program_id(2) * bricks_per_split
    end = tl.minimum(begin + bricks_per_split, bricks)
    token = tl.arange(0, TOKENS)
    active = x + (first + token).to(tl.int64)[:, None, None] * inputs
    sums = tl.zeros((TOKENS, ROWS, 64), dtype=tl.float32)
    for brick in tl.range(begin, end, 4, num_stages=STAGES):
        here = (brick + mine < end)[None, :]
        packed = tl.load(word + brick * 1024, mask=here, other=0)
        for j in tl.static_range(SUB):
            group = ((brick + mine) * SUB + j if SUB > 1 else (brick + mine) // bricks_per_group) * padded
            scale = tl.load(scale_of + group[None, :], mask=here, other=0.0).to(tl.float32)
            zero = 8.0
            if ASYMMETRIC:
                zero = tl.load(zero_of + group[None, :], mask=here, other=0).to(tl.float32)
            part = tl.zeros((TOKENS, ROWS, 64), dtype=tl.float32)
            for i in tl.static_range(8 // SUB):
                nibble = j * (8 // SUB) + i
                column = (brick + mine) * 128 + nibble * 16 + depth
                keep = (column < inputs)[None, None, :] & (first + token < last)[:, None, None] & here[None]
                act = tl.load(active + column[None, None, :], mask=keep, other=0.0).to(tl.float32)
                # 2^23 + code in fp32's bits: the same trick, one float wider
                weight = (((packed >> (4 * nibble)) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - (
                    zero + 8388608.0
                )
                part += weight[None] * act
            sums += part * scale[None]
    total = tl.trans(tl.sum(sums, 2))
    store(out, total, rows, first + token, last, bias, expert, tl.program_id(2), tokens, outputs, SPLIT, BIASED)


@triton.jit(do_not_specialize=["tokens"])
def sum_kernel(parts, offsets, out, tokens, outputs, splits, EXPERTS: tl.constexpr, SIZE: tl.constexpr):
    """out [tokens, outputs] = parts [splits, tokens, outputs], added in order; rows of no expert become 0."""
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    token = tl.program_id(0)
    keep = column < outputs
    if EXPERTS > 0:
        keep = keep & (token >= tl.load(offsets)) & (token < tl.load(offsets + EXPERTS))
    total = tl.zeros((SIZE,), dtype=tl.float32)
    part = parts + token.to(tl.int64) * outputs + column
    for _ in range(splits):
        total += tl.load(part, mask=keep, other=0.0)
        part += tl.cast(tokens, tl.int64) * outputs
    tl.store(out + token.to(tl.int64) * outputs + column, total.to(out.dtype.element_ty), mask=column < outputs)


@triton.jit
def expand_kernel(
    words, scales, zeros, out, outputs, inputs, bricks, bricks_per_group, padded, SUB: tl.constexpr,
    ASYMMETRIC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out [outputs, inputs] of one expert in 16 bits: (code - zero) * scale in fp32, rounded once; a brick each."""
    brick = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, 16)
    word = words + ((rows // 64) * (bricks * 1024) + (rows % 64) * 16).to(tl.int64)[:, None] + depth[None, :]
    packed = tl.load(word + brick * 1024)
    target = out + rows.to(tl.int64)[:, None] * inputs + depth[None, :]
    for nibble in tl.static_range(8):
        group = (brick * SUB + nibble * SUB // 8 if SUB > 1 else brick // bricks_per_group) * padded
        scale = tl.load(scales + group + rows).to(tl.float32)[:, None]
        zero = tl.load(zeros + group + rows).to(tl.float32)[:, None] if ASYMMETRIC else 8.0
        weight = (((packed >> (4 * nibble)) & 15).to(tl.float32) - zero) * scale
        start = brick * 128 + nibble * 16
        keep = (rows < outputs)[:, None] & (start + depth < inputs)[None, :]
        tl.store(target + start, weight.to(out.dtype.element_ty), mask=keep)

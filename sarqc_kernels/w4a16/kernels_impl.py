"""The Triton kernels of W4A16, all on bricks (see `layout`). `triton_impl` launches them.

What they share: codes become 16-bit floats without a conversion. A code OR-ed into the bits of a constant whose last
mantissa bit counts 1 is the number constant + code: 0x4300 is 128 in bf16, 0x6400 is 1024 in fp16. Subtracting
constant + zero, itself exact, leaves code - zero, a small integer: exact in either dtype. Dots are then sums
of exact integers times activations in fp32, and the scale of a group multiplies the fp32 sum once. So a weight is never
rounded to 16 bits at all, and one that meets an activation of 1 comes out as (code - zero) * scale, rounded once.

Brick b of a row block starts at word 256 BITS b; a tile takes consecutive row blocks; rows and inputs are padded in the
layout, so loads of weights, scales and zeros need no mask. `locate` finds a program's tile of tokens among ragged
experts from `offsets` in registers: no list of tiles is built, nothing waits for the device. INDEXED: row r of x is
x[index[r]], so that tokens need not be copied into the order of their experts. GATED: a tile pairs gate rows with their
up rows and gives silu(gate) * up, so that neither is ever written.
"""

# Triton reads the annotations of a kernel: those of run-time arguments have to be absent.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["combine_kernel", "dot_kernel", "expand_kernel", "gemv_kernel", "sum_kernel"]


@triton.jit
def centered(codes, zeros, BITS: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """code - zero, exactly, in DTYPE (bf16 or fp16); both are int32 below 2^BITS."""
    if BITS == 8 or INTERPRETED:  # the constant's mantissa has room for 7 bits; the interpreter has no bf16 arithmetic
        return (codes - zeros).to(tl.float32).to(DTYPE)
    magic: tl.constexpr = 0x4300 if DTYPE == tl.bfloat16 else 0x6400  # noqa: SIM300
    weight = (codes | magic).to(tl.int16).to(DTYPE, bitcast=True)
    zero = (zeros | magic).to(tl.int16).to(DTYPE, bitcast=True)
    return weight - zero


@triton.jit
def plane(words, row, depth, first, WIDTH: tl.constexpr):
    """Words of a plane of WIDTH bits that begins at `words` + `first`, so shifted that slice i begins at bit 4 i."""
    place = row * (4 * WIDTH) + depth % (4 * WIDTH)
    return tl.load(words + (first + place)) >> (depth // (4 * WIDTH) * WIDTH)


@triton.jit
def planes(words, row, depth, BITS: tl.constexpr):
    """The planes of a brick of BITS bits, low bits first (see `layout`); the second is the first where there is one."""
    if BITS == 3:
        return plane(words, row, depth, 0, 2), plane(words, row, depth, 512, 1)
    if BITS == 8:
        return plane(words, row, depth, 0, 4), plane(words, row, depth, 1024, 4)
    only = plane(words, row, depth, 0, BITS)
    return only, only


@triton.jit
def slice_of(low, high, i: tl.constexpr, BITS: tl.constexpr):
    """Codes of inputs 16 i .. 16 i + 15 of a brick: a shift and a mask for each plane."""
    if BITS == 3:
        return ((low >> (4 * i)) & 3) | (((high >> (4 * i)) & 1) << 2)
    if BITS == 8:
        return ((low >> (4 * i)) & 15) | (((high >> (4 * i)) & 15) << 4)
    return (low >> (4 * i)) & ((1 << BITS) - 1)


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
def rows_of(tile, outputs, ROWS: tl.constexpr, GATED: tl.constexpr):
    """Rows of the weight in a tile. GATED: half of them gate rows, the other half the up rows that belong to them."""
    lane = tl.arange(0, ROWS)
    if GATED:
        return tile * (ROWS // 2) + lane % (ROWS // 2) + lane // (ROWS // 2) * outputs
    return tile * ROWS + lane


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up in fp32; where exp overflows, silu is 0 as it should be."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def store(out, sums, tile, tokens, last, bias, expert, split, count, outputs,
          ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, BIASED: tl.constexpr,
          GATED: tl.constexpr):  # fmt: skip
    """sums [ROWS, TOKENS] to out [splits, count, width], bias added in the first split.

    width is outputs; GATED with splits keeps gate and up apart, 2 * outputs wide, for `sum_kernel` to join.
    """
    rows = rows_of(tile, outputs, ROWS, GATED)
    width = outputs
    inside = rows < outputs
    if GATED:
        width = outputs * 2
        inside = tile * (ROWS // 2) + tl.arange(0, ROWS) % (ROWS // 2) < outputs
    if BIASED:
        offset = tl.load(bias + expert * width + rows, mask=inside, other=0.0).to(tl.float32)
        sums += tl.where(split == 0, offset, 0.0)[:, None]
    if GATED and not SPLIT:
        pairs = tl.permute(tl.reshape(sums, (2, ROWS // 2, TOKENS)), (1, 2, 0))
        gate, up = tl.split(pairs)
        sums = silu_times(gate, up)
        rows = rows_of(tile, outputs, ROWS // 2, False)
        width = outputs
        inside = rows < outputs
    place = tokens.to(tl.int64)
    if SPLIT:
        place += split.to(tl.int64) * count
    keep = inside[:, None] & (tokens < last)[None, :]
    tl.store(out + place[None, :] * width + rows[:, None], sums.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["tokens"])
def dot_kernel(
    x, words, scales, zeros, offsets, index, bias, out, tokens, outputs, inputs, bricks, groups, bricks_per_group,
    padded, bricks_per_split, BITS: tl.constexpr, EXPERTS: tl.constexpr, SPAN: tl.constexpr, SUB: tl.constexpr,
    ASYMMETRIC: tl.constexpr, BIASED: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, INDEXED: tl.constexpr,
    GATED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS of the weight, TOKENS] on the tensor cores, weights as first operand from registers.

    Grid (tiles of tokens, tiles of rows, splits): programs beside each other read the same weights. Eight dots of depth
    16 for each brick; SUB groups to a brick, their sums scaled apart. WHOLE: inputs % 128 == 0.
    """
    expert, first, last = locate(offsets, tl.program_id(0), tokens, EXPERTS, SPAN, TOKENS)
    if EXPERTS > 0:  # noqa: SIM102  (known when compiled; the next line is not)
        if expert == EXPERTS:
            return
    expert = tl.cast(expert, tl.int64)
    rows = rows_of(tl.program_id(1), outputs, ROWS, GATED)
    token = first + tl.arange(0, TOKENS)
    source = tl.load(index + token, mask=token < last, other=0) if INDEXED else token
    depth = tl.arange(0, 16)
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    word = words + expert * bricks * padded * (4 * BITS)
    word += ((rows // 64) * (bricks * (256 * BITS)))[:, None]
    scale_of, zero_of = scales + expert * groups * padded + rows, zeros + expert * groups * padded + rows
    active = x + source.to(tl.int64)[None, :] * inputs + depth[:, None]
    begin = tl.program_id(2) * bricks_per_split
    sums = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for brick in range(begin, tl.minimum(begin + bricks_per_split, bricks)):
        low, high = planes(word + brick * (256 * BITS), (rows % 64)[:, None], depth[None, :], BITS)
        for j in tl.static_range(SUB):
            group = (brick * SUB + j if SUB > 1 else brick // bricks_per_group) * padded
            scale = tl.load(scale_of + group).to(tl.float32)  # before the dots: they hide some of its latency
            zero = tl.load(zero_of + group).to(tl.int32) if ASYMMETRIC else tl.full((ROWS,), MIDDLE, tl.int32)
            part = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
            for i in tl.static_range(8 // SUB):
                nibble = j * (8 // SUB) + i
                start = brick * 128 + nibble * 16
                keep = (token < last)[None, :]
                if not WHOLE:
                    keep = keep & (start + depth < inputs)[:, None]
                act = tl.load(active + start, mask=keep, other=0.0)
                codes = slice_of(low, high, nibble, BITS)
                weight = centered(codes, zero[:, None], BITS, act.dtype, INTERPRETED)
                part = tl.dot(weight, act, part)
            sums += part * scale[:, None]
    store(out, sums, tl.program_id(1), token, last, bias, expert, tl.program_id(2), tokens, outputs,
          ROWS, TOKENS, SPLIT, BIASED, GATED)  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def gemv_kernel(
    x, words, scales, zeros, offsets, index, bias, out, tokens, outputs, inputs, bricks, groups, bricks_per_group,
    padded, bricks_per_split, BITS: tl.constexpr, EXPERTS: tl.constexpr, SPAN: tl.constexpr, SUB: tl.constexpr,
    ASYMMETRIC: tl.constexpr, BIASED: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, INDEXED: tl.constexpr,
    GATED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
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
    rows = rows_of(tl.program_id(1), outputs, ROWS, GATED)
    lane = tl.arange(0, 64)
    mine, depth = lane // 16, lane % 16
    word = words + expert * bricks * padded * (4 * BITS)
    word += ((rows // 64) * (bricks * (256 * BITS)))[:, None] + (mine * (256 * BITS))[None, :]
    scale_of, zero_of = (
        scales + expert * groups * padded + rows[:, None],
        zeros + expert * groups * padded + rows[:, None],
    )
    begin = tl.program_id(2) * bricks_per_split
    end = tl.minimum(begin + bricks_per_split, bricks)
    token = tl.arange(0, TOKENS)
    source = tl.load(index + first + token, mask=first + token < last, other=0) if INDEXED else first + token
    active = x + source.to(tl.int64)[:, None, None] * inputs
    sums = tl.zeros((TOKENS, ROWS, 64), dtype=tl.float32)
    for brick in tl.range(begin, end, 4, num_stages=STAGES):
        here = (brick + mine < end)[None, :]
        # the last step's lanes may stand behind the last brick: they read the first one and count for nothing
        place = word + tl.where(here, brick, -mine[None, :]) * (256 * BITS)
        low, high = planes(place, (rows % 64)[:, None], depth[None, :], BITS)
        for j in tl.static_range(SUB):
            group = ((brick + mine) * SUB + j if SUB > 1 else (brick + mine) // bricks_per_group) * padded
            scale = tl.load(scale_of + group[None, :], mask=here, other=0.0).to(tl.float32)
            zero = float(1 << (BITS - 1))
            if ASYMMETRIC:
                zero = tl.load(zero_of + group[None, :], mask=here, other=0).to(tl.float32)
            part = tl.zeros((TOKENS, ROWS, 64), dtype=tl.float32)
            for i in tl.static_range(8 // SUB):
                nibble = j * (8 // SUB) + i
                column = (brick + mine) * 128 + nibble * 16 + depth
                keep = (column < inputs)[None, None, :] & (first + token < last)[:, None, None] & here[None]
                act = tl.load(active + column[None, None, :], mask=keep, other=0.0).to(tl.float32)
                codes = slice_of(low, high, nibble, BITS)
                # 2^23 + code in fp32's bits: the same trick, one float wider
                weight = (codes | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)
                part += weight[None] * act
            sums += part * scale[None]
    total = tl.trans(tl.sum(sums, 2))
    store(out, total, tl.program_id(1), first + token, last, bias, expert, tl.program_id(2), tokens, outputs,
          ROWS, TOKENS, SPLIT, BIASED, GATED)  # fmt: skip


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
               SIZE: tl.constexpr):  # fmt: skip
    """out [tokens, outputs] = the sum of parts [splits, tokens, width]; rows of no expert become 0.

    width is outputs; GATED: 2 * outputs, gate before up, and out is silu(gate) * up of the sums.
    """
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


@triton.jit
def expand_kernel(
    words, scales, zeros, out, outputs, inputs, bricks, bricks_per_group, padded, BITS: tl.constexpr,
    SUB: tl.constexpr, ASYMMETRIC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out [outputs, inputs] of one expert in 16 bits: (code - zero) * scale in fp32, rounded once; a brick each."""
    brick = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, 16)
    word = words + ((rows // 64) * bricks + brick).to(tl.int64)[:, None] * (256 * BITS)
    low, high = planes(word, (rows % 64)[:, None], depth[None, :], BITS)
    target = out + rows.to(tl.int64)[:, None] * inputs + depth[None, :]
    for i in tl.static_range(8):
        group = (brick * SUB + i * SUB // 8 if SUB > 1 else brick // bricks_per_group) * padded
        scale = tl.load(scales + group + rows).to(tl.float32)[:, None]
        zero = tl.load(zeros + group + rows).to(tl.float32)[:, None] if ASYMMETRIC else float(1 << (BITS - 1))
        weight = (slice_of(low, high, i, BITS).to(tl.float32) - zero) * scale
        start = brick * 128 + i * 16
        keep = (rows < outputs)[:, None] & (start + depth < inputs)[None, :]
        tl.store(target + start, weight.to(out.dtype.element_ty), mask=keep)

"""The Triton kernels of W4A16, all on k_tiles (see `layout`). `launch` launches them.

Dots are sums of exact integers, code - zero, times activations in fp32, and the scale of a group multiplies its sum
once: a weight is never rounded to 16 bits at all. With many tokens (`dot_kernel`, FOLDED) it is rounded once. Either
way one that meets an activation of 1 comes out as (code - zero) * scale, rounded once.

Brick b of a row block starts at word 256 BITS b; a tile takes consecutive row blocks; rows and inputs are padded in the
layout, so loads of weights, scales and zeros need no mask. `locate` finds a program's tile of tokens among ragged
experts from `offsets` in registers: no list of tiles is built, nothing waits for the device. INDEXED: row r of x is
x[index[r]], so that tokens need not be copied into the order of their experts. GATED: a tile pairs gate rows with their
up rows and gives silu(gate) * up, so that neither is ever written.
"""

# Triton reads the annotations of a kernel: those of run-time arguments have to be absent.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# ruff: noqa: RUF005, SIM102, SIM108  (Triton joins tuples by +; an `if` of constants is a choice made when it compiles)

from __future__ import annotations

import triton
import triton.language as tl

from sarqc_kernels.w4a16.triton.reduce import silu_times
from sarqc_kernels.w4a16.triton.unpack import fields_of, interleaved, lanes_of, slice_of, weights_of

__all__ = ["dot_kernel", "expand_kernel", "gemv_kernel"]


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
def blocks_of(offsets, tokens, EXPERTS: tl.constexpr, SPAN: tl.constexpr, SIZE: tl.constexpr):
    """How many tiles of SIZE rows `locate` knows."""
    if EXPERTS == 0:
        out = tl.cdiv(tokens, SIZE)
    else:
        expert = tl.arange(0, SPAN)
        begin = tl.load(offsets + expert, mask=expert < EXPERTS, other=0).to(tl.int32)
        end = tl.load(offsets + expert + 1, mask=expert < EXPERTS, other=0).to(tl.int32)
        out = tl.sum((end - begin + SIZE - 1) // SIZE, 0)
    return out


@triton.jit
def grouped(number, blocks, row_tiles):
    """(tile of tokens, tile of rows) at place `number` of the order in which a persistent grid takes them.

    Eight tiles of tokens with all tiles of rows, then the next eight: what a card works on at once is about as many
    bytes of activations as of weights, and each is read from memory few times (see `config`).
    """
    first = number // (8 * row_tiles) * 8
    inside = number % (8 * row_tiles)
    size = tl.minimum(blocks - first, 8)
    return first + inside % size, inside // size


@triton.jit
def rows_of(tile, outputs, ROWS: tl.constexpr, GATED: tl.constexpr):
    """Rows of the weight in a tile. GATED: half of them gate rows, the other half the up rows that belong to them."""
    lane = tl.arange(0, ROWS)
    if GATED:
        return tile * (ROWS // 2) + lane % (ROWS // 2) + lane // (ROWS // 2) * outputs
    return tile * ROWS + lane


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


@triton.jit
def scaled(fields, scales, zeros, first: tl.constexpr, COUNT: tl.constexpr, SUB: tl.constexpr, BITS: tl.constexpr,
           ASYMMETRIC: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """(code - zero) * scale of groups first .. of a k_tile, rounded once to DTYPE: [R, COUNT * 128 / SUB]."""
    if COUNT > 1:
        out = interleaved(
            scaled(fields, scales, zeros, first, COUNT // 2, SUB, BITS, ASYMMETRIC, DTYPE, INTERPRETED),
            scaled(fields, scales, zeros, first + COUNT // 2, COUNT // 2, SUB, BITS, ASYMMETRIC, DTYPE, INTERPRETED),
        )
    else:
        weight = weights_of(fields, zeros[first], first * (8 // SUB), 8 // SUB, BITS, ASYMMETRIC, DTYPE, INTERPRETED)
        scale = scales[first]
        if scale.dtype != DTYPE or INTERPRETED:
            out = (weight.to(tl.float32) * scale.to(tl.float32)).to(DTYPE)
        else:  # both are exact, so their product is rounded once
            out = weight * scale
    return out


@triton.jit
def dot_tile(
    x, words, scales, zeros, index, bias, out, expert, first, last, tile, split, tokens, outputs, inputs, k_tiles,
    groups, tiles_per_group, padded, tiles_per_split, BITS: tl.constexpr, SUB: tl.constexpr,
    ASYMMETRIC: tl.constexpr, BIASED: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, INDEXED: tl.constexpr,
    GATED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, FOLDED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS of the weight, TOKENS]: rows of `tile`, tokens first .. last - 1, inputs of `split`."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    rows = rows_of(tile, outputs, ROWS, GATED)
    if ROWS > 128:  # taller than what rows are padded to
        rows = tl.minimum(rows, padded - 1)
    token = first + tl.arange(0, TOKENS)
    source = tl.load(index + token, mask=token < last, other=0) if INDEXED else token
    word = words + tl.cast(expert, tl.int64) * k_tiles * padded * (4 * BITS) + (rows // 64) * (k_tiles * (256 * BITS))
    grid = tl.cast(expert, tl.int64) * groups * padded + rows
    DEPTH: tl.constexpr = 128 if FOLDED else 128 // SUB
    depth = tl.arange(0, DEPTH)
    active = x + source.to(tl.int64)[None, :] * inputs + depth[:, None]
    begin = split * tiles_per_split
    sums = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for k_tile in range(begin, tl.minimum(begin + tiles_per_split, k_tiles)):
        scale, zero = (), ()
        for j in tl.static_range(SUB):
            group = (k_tile * SUB + j if SUB > 1 else k_tile // tiles_per_group) * padded
            scale = scale + (tl.load(scales + (grid + group))[:, None],)
            if ASYMMETRIC:
                zero = zero + (tl.load(zeros + (grid + group)).to(tl.int32)[:, None],)
            else:
                zero = scale  # not looked at
        fields = fields_of(word + k_tile * (256 * BITS), rows % 64, BITS, DTYPE, INTERPRETED)
        for j in tl.static_range(128 // DEPTH):
            start = k_tile * 128 + j * DEPTH
            keep = (token < last)[None, :]
            if not WHOLE:
                keep = keep & (start + depth < inputs)[:, None]
            act = tl.load(active + start, mask=keep, other=0.0)
            if FOLDED:
                weight = scaled(fields, scale, zero, 0, SUB, SUB, BITS, ASYMMETRIC, DTYPE, INTERPRETED)
                sums = tl.dot(weight, act, sums)
            else:
                weight = weights_of(fields, zero[j], j * (8 // SUB), 8 // SUB, BITS, ASYMMETRIC, DTYPE, INTERPRETED)
                sums += tl.dot(weight.to(DTYPE), act) * scale[j].to(tl.float32)
    store(out, sums, tile, token, last, bias, expert, split, tokens, outputs,
          ROWS, TOKENS, SPLIT, BIASED, GATED)  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def dot_kernel(
    x, words, scales, zeros, offsets, index, bias, out, tokens, outputs, inputs, k_tiles, groups, tiles_per_group,
    padded, tiles_per_split, BITS: tl.constexpr, EXPERTS: tl.constexpr, SPAN: tl.constexpr, SUB: tl.constexpr,
    ASYMMETRIC: tl.constexpr, BIASED: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, INDEXED: tl.constexpr,
    GATED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    FOLDED: tl.constexpr, PERSISTENT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Tiles [ROWS of the weight, TOKENS] on the tensor cores, weights as first operand from registers.

    One dot for each group of inputs, whose sums are scaled in fp32; FOLDED: the scale is multiplied into the weight
    and there is one dot for each k_tile, which runs while the next k_tile is unpacked. WHOLE: inputs % 128 == 0.

    Grid (tiles of tokens, tiles of rows, splits): programs beside each other read the same weights. PERSISTENT: as many
    programs as a card holds at once, no splits; each takes every so-many-th tile in the order of `grouped`.
    """
    if PERSISTENT:
        row_tiles = tl.cdiv(outputs, ROWS // 2 if GATED else ROWS)
        blocks = blocks_of(offsets, tokens, EXPERTS, SPAN, TOKENS)
        for number in range(tl.program_id(0), blocks * row_tiles, tl.num_programs(0)):
            block, tile = grouped(number, blocks, row_tiles)
            expert, first, last = locate(offsets, block, tokens, EXPERTS, SPAN, TOKENS)
            dot_tile(x, words, scales, zeros, index, bias, out, expert, first, last, tile, 0, tokens, outputs, inputs,
                     k_tiles, groups, tiles_per_group, padded, tiles_per_split, BITS, SUB, ASYMMETRIC, BIASED, SPLIT,
                     WHOLE, INDEXED, GATED, TOKENS, ROWS, FOLDED, INTERPRETED)  # fmt: skip
    else:
        expert, first, last = locate(offsets, tl.program_id(0), tokens, EXPERTS, SPAN, TOKENS)
        if EXPERTS > 0:
            if expert == EXPERTS:
                return
        dot_tile(x, words, scales, zeros, index, bias, out, expert, first, last, tl.program_id(1), tl.program_id(2),
                 tokens, outputs, inputs, k_tiles, groups, tiles_per_group, padded, tiles_per_split, BITS, SUB,
                 ASYMMETRIC, BIASED, SPLIT, WHOLE, INDEXED, GATED, TOKENS, ROWS, FOLDED, INTERPRETED)  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def gemv_kernel(
    x, words, scales, zeros, offsets, index, bias, out, tokens, outputs, inputs, k_tiles, groups, tiles_per_group,
    padded, tiles_per_split, BITS: tl.constexpr, EXPERTS: tl.constexpr, SPAN: tl.constexpr, SUB: tl.constexpr,
    ASYMMETRIC: tl.constexpr, BIASED: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, INDEXED: tl.constexpr,
    GATED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One or two tokens: fp32 multiply-adds in place of the tensor core; arguments and grid as of `dot_kernel`.

    A step takes four k_tiles of ROWS rows, a word of eight weights for each of [ROWS, 4 x 16] places, and the loads of
    STAGES steps are under way at once. Lanes are added up only after the last step.
    """
    expert, first, last = locate(offsets, tl.program_id(0), tokens, EXPERTS, SPAN, TOKENS)
    if EXPERTS > 0:
        if expert == EXPERTS:
            return
    expert = tl.cast(expert, tl.int64)
    rows = rows_of(tl.program_id(1), outputs, ROWS, GATED)
    lane = tl.arange(0, 64)
    mine, depth = lane // 16, lane % 16
    word = words + expert * k_tiles * padded * (4 * BITS)
    word += ((rows // 64) * (k_tiles * (256 * BITS)))[:, None] + (mine * (256 * BITS))[None, :]
    scale_of, zero_of = (
        scales + expert * groups * padded + rows[:, None],
        zeros + expert * groups * padded + rows[:, None],
    )
    begin = tl.program_id(2) * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, k_tiles)
    token = tl.arange(0, TOKENS)
    source = tl.load(index + first + token, mask=first + token < last, other=0) if INDEXED else first + token
    active = x + source.to(tl.int64)[:, None, None] * inputs
    sums = tl.zeros((TOKENS, ROWS, 64), dtype=tl.float32)
    for k_tile in tl.range(begin, end, 4, num_stages=STAGES):
        here = (k_tile + mine < end)[None, :]
        # the last step's lanes may stand behind the last k_tile: they read the first one and count for nothing
        place = word + tl.where(here, k_tile, -mine[None, :]) * (256 * BITS)
        lanes = lanes_of(place, (rows % 64)[:, None], depth[None, :], BITS)
        for j in tl.static_range(SUB):
            group = ((k_tile + mine) * SUB + j if SUB > 1 else (k_tile + mine) // tiles_per_group) * padded
            scale = tl.load(scale_of + group[None, :], mask=here, other=0.0).to(tl.float32)
            zero = float(1 << (BITS - 1))
            if ASYMMETRIC:
                zero = tl.load(zero_of + group[None, :], mask=here, other=0).to(tl.float32)
            part = tl.zeros((TOKENS, ROWS, 64), dtype=tl.float32)
            for i in tl.static_range(8 // SUB):
                nibble = j * (8 // SUB) + i
                column = (k_tile + mine) * 128 + nibble * 16 + depth
                keep = (column < inputs)[None, None, :] & (first + token < last)[:, None, None] & here[None]
                act = tl.load(active + column[None, None, :], mask=keep, other=0.0).to(tl.float32)
                codes = slice_of(lanes, nibble, BITS)
                # 2^23 + code in fp32's bits: the same trick, one float wider
                weight = (codes | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)
                part += weight[None] * act
            sums += part * scale[None]
    total = tl.trans(tl.sum(sums, 2))
    store(out, total, tl.program_id(1), first + token, last, bias, expert, tl.program_id(2), tokens, outputs,
          ROWS, TOKENS, SPLIT, BIASED, GATED)  # fmt: skip


@triton.jit
def expand_kernel(
    words, scales, zeros, out, outputs, inputs, k_tiles, tiles_per_group, padded, BITS: tl.constexpr,
    SUB: tl.constexpr, ASYMMETRIC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out [outputs, inputs] of one expert in 16 bits: (code - zero) * scale in fp32, rounded once; a k_tile each."""
    k_tile = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, 16)
    word = words + ((rows // 64) * k_tiles + k_tile).to(tl.int64)[:, None] * (256 * BITS)
    lanes = lanes_of(word, (rows % 64)[:, None], depth[None, :], BITS)
    target = out + rows.to(tl.int64)[:, None] * inputs + depth[None, :]
    for i in tl.static_range(8):
        group = (k_tile * SUB + i * SUB // 8 if SUB > 1 else k_tile // tiles_per_group) * padded
        scale = tl.load(scales + group + rows).to(tl.float32)[:, None]
        zero = tl.load(zeros + group + rows).to(tl.float32)[:, None] if ASYMMETRIC else float(1 << (BITS - 1))
        weight = (slice_of(lanes, i, BITS).to(tl.float32) - zero) * scale
        start = k_tile * 128 + i * 16
        keep = (rows < outputs)[:, None] & (start + depth < inputs)[None, :]
        tl.store(target + start, weight.to(out.dtype.element_ty), mask=keep)

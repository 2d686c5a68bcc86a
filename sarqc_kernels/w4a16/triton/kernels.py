"""The Triton kernels of W4A16, all on packed tiles (see `layout`). `launch` launches them.

y = W x is computed as a GEMM with swapped operands (swap-AB): the dequantized weight is the first operand of the
tensor core, from registers (on sm_90 an RS wgmma), and tokens are its columns, of which 16 are enough. Sums over groups
of inputs are sums of exact integers, code - zero, times activations in fp32, and the scale of a group multiplies its
sum once: a weight is never rounded to 16 bits at all. With many tokens (`dot_kernel`, FOLDED) it is rounded once, scale
and all, and one sum runs through all tiles. Either way one that meets an activation of 1 comes out as
(code - zero) * scale, rounded once.

Tile t of a block of 64 rows begins at word 256 BITS t; a program takes consecutive blocks; rows and inputs are padded
in the layout, so loads of weights, scales and zeros need no mask. `locate` finds a program's block of tokens among
ragged experts from `offsets` in registers: no list is built, nothing waits for the device. INDEXED: row r of x is
x[index[r]], so that tokens need not be copied into the order of their experts. GATED (SwiGLU): a block pairs gate rows
with their up rows and gives silu(gate) * up, so that neither is ever written.

BLOCK_M is tokens of a program, BLOCK_N rows of the weight. TAIL more tokens have sums of their own beside BLOCK_M,
which has to be a power of two: 129 tokens cost 144 and not 256. Arguments that belong together are tuples: `data` is
(x, words, scales, zeros, index, bias, out), `sizes` (M, N, K, k_tiles, groups, tiles_per_group, padded,
tiles_per_split).
"""

# Triton reads the annotations of a kernel: those of run-time arguments have to be absent.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# ruff: noqa: RUF005, SIM102, SIM108  (Triton joins tuples by +; an `if` of constants is a choice made when it compiles)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from sarqc_kernels.w4a16.triton.reduce import silu_times
from sarqc_kernels.w4a16.triton.unpack import codes_at, fields_of, interleaved, weights_of, words_at

__all__ = ["dot_kernel", "expand_kernel"]


@triton.jit
def locate(offsets, block, tokens, EXPERTS: tl.constexpr, SPAN: tl.constexpr, SIZE: tl.constexpr):
    """(expert, first row, row behind the last of the expert) of the `block`-th block of SIZE rows.

    expert = EXPERTS where there is no such block. SPAN: a power of two, at least EXPERTS.
    """
    if EXPERTS == 0:
        return 0, block * SIZE, tokens
    expert = tl.arange(0, SPAN)
    begin = tl.load(offsets + expert, mask=expert < EXPERTS, other=0).to(tl.int32)
    end = tl.load(offsets + expert + 1, mask=expert < EXPERTS, other=0).to(tl.int32)
    blocks = (end - begin + SIZE - 1) // SIZE
    upto = tl.cumsum(blocks, 0)
    mine = (block >= upto - blocks) & (block < upto)  # of at most one expert
    owner = tl.sum(tl.where(mine, expert, 0), 0)
    first = tl.sum(tl.where(mine, begin + (block - upto + blocks) * SIZE, 0), 0)
    stop = tl.sum(tl.where(mine, end, 0), 0)
    any_block = tl.sum(mine.to(tl.int32), 0)
    return tl.where(any_block > 0, owner, EXPERTS), first, stop


@triton.jit
def blocks_of(offsets, tokens, EXPERTS: tl.constexpr, SPAN: tl.constexpr, SIZE: tl.constexpr):
    """How many blocks of SIZE rows `locate` knows."""
    if EXPERTS == 0:
        out = tl.cdiv(tokens, SIZE)
    else:
        expert = tl.arange(0, SPAN)
        begin = tl.load(offsets + expert, mask=expert < EXPERTS, other=0).to(tl.int32)
        end = tl.load(offsets + expert + 1, mask=expert < EXPERTS, other=0).to(tl.int32)
        out = tl.sum((end - begin + SIZE - 1) // SIZE, 0)
    return out


@triton.jit
def swizzled(number, blocks_m, blocks_n):
    """(block_m, block_n) at place `number` of the order in which a persistent grid takes them (GROUP_M = 8).

    Eight blocks of tokens with all blocks of rows, then the next eight: what a device works on at once is about as many
    bytes of activations as of weights, and each is read from memory few times (see `config`).
    """
    first = number // (8 * blocks_n) * 8
    inside = number % (8 * blocks_n)
    size = tl.minimum(blocks_m - first, 8)
    return first + inside % size, inside // size


@triton.jit
def rows_of(block_n, N, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """Rows of the weight in a block. GATED: half of them gate rows, the other half the up rows that belong to them."""
    lane = tl.arange(0, BLOCK_N)
    if GATED:
        return block_n * (BLOCK_N // 2) + lane % (BLOCK_N // 2) + lane // (BLOCK_N // 2) * N
    return block_n * BLOCK_N + lane


@triton.jit
def store(target, sums, place, tokens, sizes, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr,
          BIASED: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """The epilogue: sums [BLOCK_N, BLOCK_M] to out [splits, M, width], bias added in the first split.

    target: (out, bias). place: see `dot_block`. width is N; GATED with splits keeps gate and up apart, 2 N wide, for
    `sum_kernel` to join.
    """
    out, bias = target
    expert, last, block_n, split = place[0], place[2], place[3], place[4]
    M, N = sizes[0], sizes[1]
    rows = rows_of(block_n, N, BLOCK_N, GATED)
    width = N
    inside = rows < N
    if GATED:
        width = N * 2
        inside = block_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N) % (BLOCK_N // 2) < N
    if BIASED:
        offset = tl.load(bias + expert * width + rows, mask=inside, other=0.0).to(tl.float32)
        sums += tl.where(split == 0, offset, 0.0)[:, None]
    if GATED and not SPLIT:
        pairs = tl.permute(tl.reshape(sums, (2, BLOCK_N // 2, BLOCK_M)), (1, 2, 0))
        gate, up = tl.split(pairs)
        sums = silu_times(gate, up)
        rows = rows_of(block_n, N, BLOCK_N // 2, False)
        width = N
        inside = rows < N
    row = tokens.to(tl.int64)
    if SPLIT:
        row += split.to(tl.int64) * M
    keep = inside[:, None] & (tokens < last)[None, :]
    tl.store(out + row[None, :] * width + rows[:, None], sums.to(out.dtype.element_ty), mask=keep)


@triton.jit
def scaled(fields, scales, zeros, first: tl.constexpr, COUNT: tl.constexpr, SUB: tl.constexpr, BITS: tl.constexpr,
           ASYMMETRIC: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """(code - zero) * scale of groups first .. of a tile, rounded once to DTYPE: [R, COUNT * 128 / SUB]."""
    if COUNT > 1:
        out = interleaved(
            scaled(fields, scales, zeros, first, COUNT // 2, SUB, BITS, ASYMMETRIC, DTYPE),
            scaled(fields, scales, zeros, first + COUNT // 2, COUNT // 2, SUB, BITS, ASYMMETRIC, DTYPE),
        )
    else:
        weight = weights_of(fields, zeros[first], first * (8 // SUB), 8 // SUB, BITS, ASYMMETRIC, DTYPE)
        scale = scales[first]
        if scale.dtype != DTYPE:
            out = (weight.to(tl.float32) * scale.to(tl.float32)).to(DTYPE)
        else:  # both are exact, so their product is rounded once
            out = weight * scale
    return out


@triton.jit
def finished(sums):
    """The same sums, behind the end of the products that add to them.

    A wgmma reads its first operand from registers after it has been issued. ptxas before 13.3 takes those registers for
    free at once (triton-lang/triton#9433), so nothing may be computed while a product runs. A copy that Triton does not
    look into makes it wait here; ptxas drops the copy.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [sums], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def active_of(x, index, first, last, depth, K, BLOCK_M: tl.constexpr, INDEXED: tl.constexpr):
    """(pointers to inputs `depth` of BLOCK_M rows of x from row `first` on, the rows, which of them are there)."""
    token = first + tl.arange(0, BLOCK_M)
    source = tl.load(index + token, mask=token < last, other=0) if INDEXED else token
    return x + source.to(tl.int64)[None, :] * K + depth[:, None], token, (token < last)[None, :]


@triton.jit
def grid_of(scales, zeros, row, k_tile, sizes, SUB: tl.constexpr, ASYMMETRIC: tl.constexpr):
    """Scales and zeros of a tile's groups, a tuple of [R, 1] each. row: where the rows' own begin."""
    tiles_per_group, padded = sizes[5], sizes[6]
    scale, zero = (), ()
    for j in tl.static_range(SUB):
        group = (k_tile * SUB + j if SUB > 1 else k_tile // tiles_per_group) * padded
        scale = scale + (tl.load(scales + (row + group))[:, None],)
        if ASYMMETRIC:
            zero = zero + (tl.load(zeros + (row + group)).to(tl.int32)[:, None],)
        else:
            zero = scale  # not looked at
    return scale, zero


@triton.jit
def dot_block(
    data, place, sizes, BITS: tl.constexpr, SUB: tl.constexpr, ASYMMETRIC: tl.constexpr, BIASED: tl.constexpr,
    SPLIT: tl.constexpr, WHOLE: tl.constexpr, INDEXED: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_N: tl.constexpr, FOLDED: tl.constexpr, WAIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block [BLOCK_N, BLOCK_M + TAIL]. place: (expert, first row of x, row behind the last, block_n, split)."""
    x, words, scales, zeros, index, bias, out = data
    expert, first, last, block_n, split = place
    N, K, k_tiles, groups, padded, tiles_per_split = sizes[1], sizes[2], sizes[3], sizes[4], sizes[6], sizes[7]
    DTYPE: tl.constexpr = x.dtype.element_ty
    rows = rows_of(block_n, N, BLOCK_N, GATED)
    if BLOCK_N > 128:  # taller than what rows are padded to
        rows = tl.minimum(rows, padded - 1)
    word = words + tl.cast(expert, tl.int64) * k_tiles * padded * (4 * BITS) + (rows // 64) * (k_tiles * (256 * BITS))
    grid = tl.cast(expert, tl.int64) * groups * padded + rows
    DEPTH: tl.constexpr = 128 if FOLDED else 128 // SUB
    depth = tl.arange(0, DEPTH)
    active, token, there = active_of(x, index, first, last, depth, K, BLOCK_M, INDEXED)
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if TAIL > 0:
        active_tail, token_tail, there_tail = active_of(x, index, first + BLOCK_M, last, depth, K, TAIL, INDEXED)
        sums_tail = tl.zeros((BLOCK_N, TAIL), dtype=tl.float32)
    begin = split * tiles_per_split
    for k_tile in range(begin, tl.minimum(begin + tiles_per_split, k_tiles)):
        scale, zero = grid_of(scales, zeros, grid, k_tile, sizes, SUB, ASYMMETRIC)
        fields = fields_of(word + k_tile * (256 * BITS), rows % 64, BITS, DTYPE)
        for j in tl.static_range(128 // DEPTH):
            start = k_tile * 128 + j * DEPTH
            keep = there
            if not WHOLE:
                keep = keep & (start + depth < K)[:, None]
            act = tl.load(active + start, mask=keep, other=0.0)
            if FOLDED:
                weight = scaled(fields, scale, zero, 0, SUB, SUB, BITS, ASYMMETRIC, DTYPE)
                sums = tl.dot(weight, act, sums)
                if WAIT:
                    sums = finished(sums)
                if TAIL > 0:
                    keep_tail = there_tail
                    if not WHOLE:
                        keep_tail = keep_tail & (start + depth < K)[:, None]
                    act_tail = tl.load(active_tail + start, mask=keep_tail, other=0.0)
                    sums_tail = tl.dot(weight, act_tail, sums_tail)
                    if WAIT:
                        sums_tail = finished(sums_tail)
            else:
                weight = weights_of(fields, zero[j], j * (8 // SUB), 8 // SUB, BITS, ASYMMETRIC, DTYPE)
                sums += tl.dot(weight, act) * scale[j].to(tl.float32)
    if PDL:  # the sum over splits may be launched: it waits until all is written
        gdc_launch_dependents()
    store((out, bias), sums, place, token, sizes, BLOCK_N, BLOCK_M, SPLIT, BIASED, GATED)
    if TAIL > 0:
        store((out, bias), sums_tail, place, token_tail, sizes, BLOCK_N, TAIL, SPLIT, BIASED, GATED)


@triton.jit(do_not_specialize=["M"])
def dot_kernel(
    x, words, scales, zeros, offsets, index, bias, out, M, N, K, k_tiles, groups, tiles_per_group, padded,
    tiles_per_split, BITS: tl.constexpr, EXPERTS: tl.constexpr, SPAN: tl.constexpr, SUB: tl.constexpr,
    ASYMMETRIC: tl.constexpr, BIASED: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, INDEXED: tl.constexpr,
    GATED: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr, FOLDED: tl.constexpr,
    WAIT: tl.constexpr, PERSISTENT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Blocks [BLOCK_N, BLOCK_M + TAIL] on the tensor cores, weights as first operand from registers.

    One dot for each group of inputs, whose sums are scaled in fp32; FOLDED: the scale is multiplied into the weight
    and there is one dot for each tile, which runs while the next tile is unpacked; WAIT: it ends before (`finished`).
    WHOLE: K % 128 == 0.

    Grid (blocks of tokens, blocks of rows, splits): programs beside each other read the same weights. SPLIT (split-K):
    out holds partial sums in fp32, which `sum_kernel` adds in order. PERSISTENT: as many programs as a device holds at
    once; each takes every so-many-th block in the order of `swizzled`, without splits.
    """
    data = (x, words, scales, zeros, index, bias, out)
    sizes = (M, N, K, k_tiles, groups, tiles_per_group, padded, tiles_per_split)
    if PERSISTENT:
        blocks_n = tl.cdiv(N, BLOCK_N // 2 if GATED else BLOCK_N)
        blocks_m = blocks_of(offsets, M, EXPERTS, SPAN, BLOCK_M + TAIL)
        for number in range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
            block_m, block_n = swizzled(number, blocks_m, blocks_n)
            expert, first, last = locate(offsets, block_m, M, EXPERTS, SPAN, BLOCK_M + TAIL)
            dot_block(data, (expert, first, last, block_n, 0), sizes, BITS=BITS, SUB=SUB, ASYMMETRIC=ASYMMETRIC,
                      BIASED=BIASED, SPLIT=SPLIT, WHOLE=WHOLE, INDEXED=INDEXED, GATED=GATED, BLOCK_M=BLOCK_M, TAIL=TAIL,
                      BLOCK_N=BLOCK_N, FOLDED=FOLDED, WAIT=WAIT, PDL=PDL)  # fmt: skip
    else:
        expert, first, last = locate(offsets, tl.program_id(0), M, EXPERTS, SPAN, BLOCK_M + TAIL)
        if EXPERTS > 0:
            if expert == EXPERTS:
                return
        place = (expert, first, last, tl.program_id(1), tl.program_id(2))
        dot_block(data, place, sizes, BITS=BITS, SUB=SUB, ASYMMETRIC=ASYMMETRIC, BIASED=BIASED, SPLIT=SPLIT,
                  WHOLE=WHOLE, INDEXED=INDEXED, GATED=GATED, BLOCK_M=BLOCK_M, TAIL=TAIL, BLOCK_N=BLOCK_N,
                  FOLDED=FOLDED, WAIT=WAIT, PDL=PDL)  # fmt: skip


@triton.jit
def expand_kernel(
    words, scales, zeros, out, N, K, k_tiles, tiles_per_group, padded, BITS: tl.constexpr, SUB: tl.constexpr,
    ASYMMETRIC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Dequantization for cuBLAS: out [N, K] of one expert, (code - zero) * scale rounded once; a tile each."""
    k_tile = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, 16)
    word = words + ((rows // 64) * k_tiles + k_tile).to(tl.int64)[:, None] * (256 * BITS)
    lanes = words_at(word, (rows % 64)[:, None], depth[None, :], BITS)
    target = out + rows.to(tl.int64)[:, None] * K + depth[None, :]
    for i in tl.static_range(8):
        group = (k_tile * SUB + i * SUB // 8 if SUB > 1 else k_tile // tiles_per_group) * padded
        scale = tl.load(scales + group + rows).to(tl.float32)[:, None]
        zero = tl.load(zeros + group + rows).to(tl.float32)[:, None] if ASYMMETRIC else float(1 << (BITS - 1))
        weight = (codes_at(lanes, i, BITS).to(tl.float32) - zero) * scale
        start = k_tile * 128 + i * 16
        keep = (rows < N)[:, None] & (start + depth < K)[None, :]
        tl.store(target + start, weight.to(out.dtype.element_ty), mask=keep)

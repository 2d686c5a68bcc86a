"""From the words of a tile to numbers, in Triton (see `layout` for tiles and their planes).

Codes become 16-bit floats without a conversion. A field OR-ed into the mantissa of a power of two is the power + field:
0x4300 is 128 in bf16, 0x6400 is 1024 in fp16. The same is done to the zero, and the difference of the two is exact:
code - zero, a small integer. A plane whose bits would not fit the mantissa gets the next power of two, whose last bit
counts two; planes are subtracted apart and then added, which is exact as well, as no sum exceeds eight bits.

For the tensor core (`fields_of`, `weights_of`) the fields of a word are cut out two at a time, as a register holds two
16-bit floats: the halves of two words side by side, one shift and one AND-OR for each pair. Triton has no such
operation, so it is a piece of PTX. What comes out are tensors that only have to be interleaved; their order is a bit of
the index that every thread holds for itself in the tensor core's first operand, so no weight ever leaves its register.
That holds as long as nothing but loads, constants and elementwise steps lies between a word and the dot (an `arange`
in between would send every weight through shared memory): the ahead-of-time check counts the barriers that it costs.

For sums lane by lane (`words_at`, `codes_at`) every lane shifts its own word.
"""

# Triton reads the annotations of a kernel: those of run-time arguments have to be absent.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# ruff: noqa: RUF005  (Triton joins tuples by +, and knows an `if` from a choice made when it compiles)

from __future__ import annotations

import triton
import triton.language as tl

from sarqc_kernels.w4a16.layout import planes

__all__ = ["codes_at", "fields_of", "interleaved", "weights_of", "words_at"]

planes_of = triton.constexpr_function(planes)


@triton.constexpr_function
def magic_of(width, low, half):
    """(bits of the power of two, position of a field within it, the power) of a plane in fp16 (half) or bf16."""
    mantissa, exponent = (10, 15) if half else (7, 127)
    up = max(0, low + width - mantissa)
    return (exponent + mantissa + up) << mantissa, low - up, 2.0 ** (mantissa + up)


@triton.constexpr_function
def dequant_ptx(width, low, half):
    """The PTX of dequantization: of two words, 32 / width pairs of floats, field after field, lowest first.

    Of 4 bits in bf16, for each field i = 0 .. 7 of words $8 and $9 (see `magic_of` for the magic number 0x4300, 128):

        prmt.b32 low, $8, $9, 0x5410;                             the low halves of both words, once; high: the others
        shr.b32 part, low, 4 i;                                   the field into the last bits of both halves
        lop3.b32 $i, part, 0x000f000f, 0x43004300, 0xEA;          (part & mask) | magic: 128 + code, twice
    """
    fields = 32 // width
    power, place, _ = magic_of(width, low, half)
    steps = [f"prmt.b32 low, ${fields}, ${fields + 1}, 0x5410;", f"prmt.b32 high, ${fields}, ${fields + 1}, 0x7632;"]
    for field in range(fields):
        shift = field * width % 16 - place
        source = "low" if 2 * field < fields else "high"
        steps.append(f"shr.b32 part, {source}, {shift};" if shift >= 0 else f"shl.b32 part, {source}, {-shift};")
        mask = ((1 << width) - 1) << place
        steps.append(f"lop3.b32 ${field}, part, {mask * 0x10001}, {power * 0x10001}, 0xEA;")  # (part & mask) | power
    return "{ .reg .b32 low, high, part; " + " ".join(steps) + " }"


@triton.constexpr_function
def registers(width):
    """The operands of `dequant_ptx`, as LLVM has them."""
    return ",".join(["=r"] * (32 // width) + ["r", "r"])


@triton.constexpr_function
def repeated(value, width):
    """`value` for each field of a word."""
    return (value,) * (32 // width)


@triton.jit
def interleaved(first, second):
    """[R, D] twice -> [R, 2 D], one behind the other."""
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (first.shape[0], 2 * first.shape[1]))


@triton.jit
def plane_words(words, row, WIDTH: tl.constexpr, LOW: tl.constexpr):
    """One plane of rows `row` [R] of a tile that begins at `words` [R]: int32 [R, 4 WIDTH]."""
    place = words + (256 * LOW + row * (4 * WIDTH))
    return tl.load(place[:, None] + tl.arange(0, 4 * WIDTH)[None, :])


@triton.jit
def plane_fields(words, WIDTH: tl.constexpr, LOW: tl.constexpr, DTYPE: tl.constexpr):
    """The fields of words as floats, a tensor each: bits above a power of two."""
    return tl.inline_asm_elementwise(
        dequant_ptx(WIDTH, LOW, tl.float16 == DTYPE), registers(WIDTH), [words], dtype=repeated(DTYPE, WIDTH),
        is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def fields_of(words, row, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Of each plane of rows `row` [R] of a tile that begins at `words` [R], what `plane_fields` makes of it."""
    PLANES: tl.constexpr = planes_of(BITS)
    planes = ()
    for k in tl.static_range(len(PLANES)):
        plane = plane_words(words, row, PLANES[k][0], PLANES[k][1])
        planes = planes + (plane_fields(plane, PLANES[k][0], PLANES[k][1], DTYPE),)
    return planes


@triton.jit
def plane_slice(fields, i: tl.constexpr, WIDTH: tl.constexpr):
    """[R, 16]: one plane of inputs 16 i .. of a tile."""
    if WIDTH == 4:
        out = fields[i]
    elif WIDTH == 2:
        out = interleaved(fields[2 * i], fields[2 * i + 1])
    else:
        out = interleaved(plane_pairs(fields, 4 * i), plane_pairs(fields, 4 * i + 2))
    return out


@triton.jit
def plane_pairs(fields, i: tl.constexpr):
    """[R, 8] of a plane of one bit: fields i and i + 1 in turns."""
    pairs = tl.join(fields[i], fields[i + 1])
    return tl.reshape(pairs, (pairs.shape[0], 8))


@triton.jit
def plane_slices(fields, first: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """[R, 16 COUNT]: one plane of slices first .. of a tile."""
    if COUNT == 1:
        out = plane_slice(fields, first, WIDTH)
    else:
        out = interleaved(
            plane_slices(fields, first, COUNT // 2, WIDTH), plane_slices(fields, first + COUNT // 2, COUNT // 2, WIDTH)
        )
    return out


@triton.jit
def plane_zero(zero, BITS: tl.constexpr, WIDTH: tl.constexpr, LOW: tl.constexpr, ASYMMETRIC: tl.constexpr,
               DTYPE: tl.constexpr):  # fmt: skip
    """What a plane's fields are above: its power of two (see `plane_fields`) plus its bits of the zero."""
    MASK: tl.constexpr = (1 << WIDTH) - 1
    PLACE: tl.constexpr = magic_of(WIDTH, LOW, tl.float16 == DTYPE)
    if ASYMMETRIC:
        out = ((((zero >> LOW) & MASK) << PLACE[1]) | PLACE[0]).to(tl.int16).to(DTYPE, bitcast=True)
    else:  # a constant, as only those and loads may stand before a dot
        MIDDLE: tl.constexpr = (((1 << (BITS - 1)) >> LOW) & MASK) << LOW
        out = tl.full((1, 1), PLACE[2] + MIDDLE, DTYPE)
    return out


@triton.jit
def plane_weights(fields, zero, first: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr,
                  LOW: tl.constexpr, ASYMMETRIC: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """`weights_of` for one plane."""
    return plane_slices(fields, first, COUNT, WIDTH) - plane_zero(zero, BITS, WIDTH, LOW, ASYMMETRIC, DTYPE)


@triton.jit
def weights_of(fields, zero, first: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, ASYMMETRIC: tl.constexpr,
               DTYPE: tl.constexpr):  # fmt: skip
    """code - zero of slices first .. of a tile [R, 16 COUNT], exactly, in DTYPE.

    fields: see `fields_of`. zero: int32 [R, 1]; not looked at unless ASYMMETRIC.
    """
    PLANES: tl.constexpr = planes_of(BITS)
    total = plane_weights(fields[0], zero, first, COUNT, BITS, PLANES[0][0], 0, ASYMMETRIC, DTYPE)
    for k in tl.static_range(1, len(PLANES)):
        total += plane_weights(fields[k], zero, first, COUNT, BITS, PLANES[k][0], PLANES[k][1], ASYMMETRIC, DTYPE)
    return total


@triton.jit
def word_at(words, row, depth, WIDTH: tl.constexpr, LOW: tl.constexpr):
    """`words_at` for one plane."""
    if WIDTH == 4:
        out = tl.load(words + (256 * LOW + row * 16 + depth))
    elif WIDTH == 2:
        out = tl.load(words + (256 * LOW + row * 8 + depth % 8)) >> (depth // 8 * 2)
    else:
        out = tl.load(words + (256 * LOW + row * 4 + depth // 2 % 4)) >> (depth % 2 + depth // 8 * 2)
    return out


@triton.jit
def words_at(words, row, depth, BITS: tl.constexpr):
    """For input `depth` (below 16) of a slice, the word of each plane that holds it, so shifted that slice i begins at
    bit 4 i. words: where tiles begin. row: of a tile."""
    PLANES: tl.constexpr = planes_of(BITS)
    planes = ()
    for k in tl.static_range(len(PLANES)):
        planes = planes + (word_at(words, row, depth, PLANES[k][0], PLANES[k][1]),)
    return planes


@triton.jit
def codes_at(lanes, i: tl.constexpr, BITS: tl.constexpr):
    """Codes of inputs 16 i .. 16 i + 15 of a tile, of what `words_at` gave: a shift and a mask for each plane."""
    PLANES: tl.constexpr = planes_of(BITS)
    codes = (lanes[0] >> (4 * i)) & ((1 << PLANES[0][0]) - 1)
    for k in tl.static_range(1, len(PLANES)):
        codes |= ((lanes[k] >> (4 * i)) & ((1 << PLANES[k][0]) - 1)) << PLANES[k][1]
    return codes

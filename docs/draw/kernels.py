"""Pictures of the kernels: tiles of the Gram, panels of the columns, tiles of a packed weight."""

from __future__ import annotations

from itertools import pairwise

from docs.draw.canvas import BLUE, FAINT, GREEN, GREY, INK, ORANGE, PALE_BLUE, PALE_ORANGE, Canvas


def gram() -> str:
    """Which tiles of the Gram are computed, and from what."""
    picture = Canvas(720, 330, "tiles of the lower triangle of the Gram matrix")
    picture.text((110, 28), "x [T, K], rows by expert", anchor="middle", size=14)
    edges, names = (44, 150, 150, 226, 300), ("expert 0", "", "expert 2", "expert 3")
    for number, (top, bottom) in enumerate(pairwise(edges)):
        if bottom > top:
            picture.rect((40, top), (140, bottom - top), (PALE_BLUE, GREY, PALE_ORANGE, GREY)[number], FAINT)
            picture.text((110, bottom - 14), names[number], anchor="middle")
    picture.rect((82, 44), (18, 106), "none", BLUE, 2)
    picture.rect((136, 44), (18, 106), "none", BLUE, 2)
    picture.text((110, 318), "expert 1 has no row", FAINT, "middle", 12)
    picture.text((446, 28), "gram of expert 0  [K, K]", anchor="middle", size=14)
    count, side, left, top = 6, 42, 320, 44
    for row in range(count):
        for column in range(count):
            fill = "none" if column > row else PALE_ORANGE if column == row else PALE_BLUE
            stroke = GREY if column > row else INK
            picture.rect((left + side * column, top + side * row), (side, side), fill, stroke)
    picture.rect((left + side, top + 4 * side), (side, side), BLUE, INK, 2)
    picture.arrow((182, 96), (left + side, top + 4 * side + 12), BLUE)
    picture.text((192, 268), "two column ranges", BLUE)
    picture.text((192, 285), "make one tile", BLUE)
    picture.text((584, 76), "never computed;", FAINT)
    picture.text((584, 93), "mirrored once", FAINT)
    picture.text((584, 200), "on the diagonal:", ORANGE)
    picture.text((584, 217), "also sums of |x|", ORANGE)
    return picture.svg()


def columns() -> str:
    """The weight by panels, and the part of M that the current one needs."""
    picture = Canvas(720, 350, "left-looking column quantization by panels")
    picture.text((180, 28), "weight  [N, K], columns in processing order", anchor="middle", size=14)
    left, top, width, height = 30, 44, 300, 200
    picture.rect((left, top), (width, height), GREY, FAINT)
    picture.rect((left, top), (120, height), PALE_BLUE, FAINT)
    picture.text((left + 60, top + 95), "done:", BLUE, "middle")
    picture.text((left + 60, top + 112), "δ = w − q", BLUE, "middle")
    picture.rect((left + 120, top), (60, height), PALE_ORANGE, ORANGE, 2)
    for micro in range(1, 4):
        x = left + 120 + 15 * micro
        picture.lines([(x, top), (x, top + height)], ORANGE)
    picture.text((left + 150, top + height + 18), "panel", ORANGE, "middle")
    picture.text((left + 240, top + 104), "not touched yet", FAINT, "middle")
    picture.rect((left, top + 60), (180, 12), "none", GREEN, 2)
    picture.text((left + 60, top + 54), "a thread: one row", GREEN, "middle", 12)
    picture.text((540, 28), "M  [K, K], upper triangular, H = M Mᵀ", anchor="middle", size=14)
    left, side = 440, 220
    picture.lines([(left, top), (left + side, top), (left + side, top + side), (left, top)], INK)
    first, last = 0.4 * side, 0.6 * side
    picture.rect((left + first, top), (last - first, first), PALE_BLUE, BLUE)
    corner = [(left + first, top + first), (left + last, top + first), (left + last, top + last)]
    picture.lines([*corner, corner[0]], ORANGE, 2, fill=PALE_ORANGE)
    picture.text((left + (first + last) / 2, top + 55), "pull", BLUE, "middle")
    picture.text((left + last + 6, top + last - 4), "inside", ORANGE)
    picture.text((30, 292), "pull: one matrix product, δ of all finished columns times the blue part of M", BLUE)
    picture.text((30, 334), "M_jj², on the diagonal, is what an error in column j costs")
    picture.text((30, 312), "inside: column by column, 16 at a time in registers, with the orange part of M", ORANGE)
    return picture.svg()


def tiles() -> str:
    """A tile, a row of it, a word; and how 3 bits are split into planes."""
    picture = Canvas(720, 396, "a tile of a packed weight and the words of a row")
    picture.text((20, 28), "weight [N, K] in tiles", size=14)
    for row in range(3):
        for column in range(3):
            chosen = (row, column) == (1, 1)
            at = (20 + 56 * column, 44 + 44 * row)
            picture.rect(at, (56, 44), PALE_ORANGE if chosen else GREY, ORANGE if chosen else FAINT, 2 if chosen else 1)
    picture.text((20, 194), "64 rows × 128 inputs", ORANGE)
    picture.text((20, 211), "4 KiB, contiguous", ORANGE)
    picture.arrow((190, 110), (246, 76), ORANGE)
    picture.text((250, 28), "a row of a tile at 4 bits: sixteen words of 32 bits", size=14)
    for word in range(16):
        left = 250 + 28 * word
        picture.rect((left, 60), (28, 26), PALE_BLUE if word == 5 else "none", BLUE if word == 5 else FAINT)
        picture.text((left + 14, 78), str(word), anchor="middle", size=11)
    picture.arrow((404, 88), (404, 118), BLUE)
    picture.text((250, 136), "word 5: nibble i is the code of input 16 i + 5", BLUE)
    for nibble in range(8):
        left = 250 + 56 * (7 - nibble)
        picture.rect((left, 146), (56, 28), GREEN if nibble == 2 else PALE_BLUE, BLUE)
        ink = "#ffffff" if nibble == 2 else INK
        picture.text((left + 28, 165), str(16 * nibble + 5), ink, "middle")
    picture.text((250, 190), "bit 31", FAINT, size=11)
    picture.text((698, 190), "bit 0", FAINT, "end", 11)
    picture.text((250, 218), "nibble 2 of the sixteen words: inputs 32 to 47", GREEN)
    for word in range(16):
        left = 250 + 28 * word
        picture.rect((left, 228), (28, 24), GREEN, "#ffffff")
        picture.text((left + 14, 244), str(32 + word), "#ffffff", "middle", 11)
    picture.text((20, 296), "other bit-widths: planes, one after another in the tile", size=14)
    planes = (
        ("2 bits", ((128, "2"),)),
        ("3 bits", ((128, "low 2"), (64, "high 1"))),
        ("8 bits", ((256, "low 4"), (256, "high 4"))),
    )
    across = 20.0
    for name, parts in planes:
        picture.text((across, 326), name)
        across += 46
        for width, label in parts:
            picture.rect((across, 310), (0.55 * width, 24), PALE_ORANGE if "high" in label else PALE_BLUE, FAINT)
            picture.text((across + 0.275 * width, 326), label, anchor="middle", size=11)
            across += 0.55 * width
        across += 24
    picture.text(
        (20, 362),
        "Lengths are to scale: a row of a plane of w bits has 4 w words.",
        FAINT,
    )
    picture.text((20, 380), "Codes are joined in a register: low | high << 2 at 3 bits, low | high << 4 at 8.", FAINT)
    return picture.svg()

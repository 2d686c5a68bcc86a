"""How a quantized weight lies in memory while a model runs: chosen once, when it is loaded, and never lossy.

    stream    words int32 [E, N, ceil(K b / 32)]       any width; the checkpoint's form, what the reference reads
    int4pack  words uint8 [E, N', K / 2]               2 to 4 bits on a CPU; the order of torch's int4 product
    tiles    words int32 [E, N'/64, K'/128, 256 b]    any width on a GPU; what its kernels read

N' and K' are N and K padded with codes of scale 0, so no kernel masks a load of weights. Each form costs b/8 bytes a
weight plus its grid (int4pack half a byte: codes of 2 and 3 bits get the speed of 4 for the size of 4), and
`unpack_weight` gives back the very codes, scales and zeros that went in: one offline layout serves every number of
tokens, and an export needs no second copy.

A tile is 64 rows by 128 inputs in one piece, 4 KiB at 4 bits. Word p of a row of a tile holds in nibble i (lowest
first) the code of input 16 i + p. Nibble i of the sixteen words is then a contiguous slice of inputs, 16 deep, as deep
as one tensor-core instruction: unpacking is a shift and a mask in the register that held the word, and no code ever
moves to another thread. Other widths are cut into planes of w = 4, 2 or 1 bits (3 = 2 + 1, 7 = 4 + 2 + 1), one behind
the other in the tile. A row of a plane has only 4 w words, so a nibble is shared: bits w s .. of nibble i are share s.
In a plane of two bits input 16 i + p is in word p mod 8, share p div 8; in one of one bit, in word (p div 2) mod 4 and
share p mod 2 + 2 (p div 8). Shares are the bits of p that a thread holds for itself in the tensor core's first operand,
so that no code moves there either. Scales and zeros of tiles lie [E, G', N'], rows innermost, as the rows of a tile
are read together.

torch's order interleaves the rows of a block of B = 64 (AVX-512) or 32 (AVX2): byte (k, j) of a block holds row j in
its low nibble and row j + B/2 in its high one. `int4pack_block` finds out by running torch once.
Its grid is bf16 [E, G, N', 2], (scale, (middle - zero) * scale), the middle code being 2^(b-1): the product computes
(nibble - 8) * scale + offset, and a nibble is a code moved up by 8 - middle, so that middles meet.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sarqc_kernels.checks import check_bits, check_contiguous, check_grid, check_tensor
from sarqc_kernels.errors import ArgumentError
from sarqc_kernels.packing import pack, unpack

__all__ = [
    "INT4PACK",
    "LAYOUTS",
    "PAD_N",
    "STREAM",
    "TILES",
    "TILE_K",
    "TILE_N",
    "RepackedWeight",
    "check_weight",
    "codes_of",
    "grid_of",
    "int4pack_block",
    "nibble_offset",
    "planes",
    "repack",
    "unpack_weight",
]

STREAM, INT4PACK, TILES = "stream", "int4pack", "tiles"
LAYOUTS = (STREAM, INT4PACK, TILES)

TILE_N, TILE_K = 64, 128
SLICE = 16  # inputs
PAD_N = 128  # tiles come in pairs: rows of a tile of the Triton kernels
INT4PACK_ROWS = 64  # rows are padded to whole blocks, so that every block has the same order
INT4PACK_GROUPS = (32, 64, 128, 256)  # what torch's product takes


def planes(bits: int) -> tuple[tuple[int, int], ...]:
    """(width, lowest bit) of the planes that tiles cut codes of `bits` bits into, low bits first."""
    widths = [4] * (bits // 4) + [2] * (bits // 2 % 2) + [1] * (bits % 2)
    return tuple([(width, sum(widths[:place])) for place, width in enumerate(widths)])


class RepackedWeight(NamedTuple):
    """A quantized weight [E, N, K] in one of `LAYOUTS`, ready for `w4a16_matmul`.

    words, scales and zeros are as the layout says (zeros None: symmetric). layout: its name. bits: of a code.
    out_features: N, not padded. in_features: K, not padded. group_size: inputs that share a scale.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    layout: str
    bits: int
    out_features: int
    in_features: int
    group_size: int


def check_weight(name: str, weight: RepackedWeight) -> None:
    """The tensors of a weight lie as `repack` made them. Only `stream` may be a view: no kernel reads it."""
    if weight.layout != STREAM:
        check_contiguous(name, words=weight.words, scales=weight.scales, zeros=weight.zeros)


def repack(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str | None = None,
) -> RepackedWeight:
    """Rearrange a weight for the device that will multiply with it.

    Args:
        codes: uint8 [E, N, K], below 2^bits.
        scales: Floating [E, N, G], G divides K.
        zeros: uint8 [E, N, G]; None: 2^(bits-1).
        bits: 2 to 8.
        dtype: Dtype of the activations that it will be multiplied with.
        device: Where the result is stored.
        layout: A name from `LAYOUTS`. None: the fastest that can hold this weight.

    Returns:
        The weight in that layout.

    Raises:
        ArgumentError: Shapes, dtypes, codes or a layout that do not fit.
    """
    check_bits(bits)
    if codes.dim() != 3 or 0 in codes.shape:
        raise ArgumentError(f"codes is {codes.dtype} {list(codes.shape)}: pass uint8 [experts, outputs, inputs]")
    check_tensor("codes", codes, tuple(codes.shape), torch.uint8)
    shape = (codes.shape[0], codes.shape[1], codes.shape[2])
    check_grid(shape, scales, zeros)
    wanted = layout or _fastest(bits, scales, shape[2], dtype, torch.device(device))
    if wanted not in LAYOUTS:
        raise ArgumentError(f"layout = {wanted!r} is not known: use one of {', '.join(LAYOUTS)}, or None")
    if wanted == STREAM:
        parts = (pack(codes, bits), scales, zeros)
    else:
        if wanted == INT4PACK and bits > 4:
            raise ArgumentError(f"layout = {wanted!r} holds 2, 3, 4 bits, not {bits}: use {STREAM!r}")
        if int(codes.max()) >= 1 << bits:
            raise ArgumentError(f"codes holds {int(codes.max())}: {bits} bits take 0 to {(1 << bits) - 1}")
        parts = (_to_int4pack if wanted == INT4PACK else _to_tiles)(codes, scales, zeros, bits)
    words, grid, offset = (None if part is None else part.to(device) for part in parts)
    assert words is not None and grid is not None
    return RepackedWeight(words, grid, offset, wanted, bits, shape[1], shape[2], shape[2] // scales.shape[2])


def unpack_weight(weight: RepackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `repack` was given, exactly.

    Args:
        weight: What `repack` returned.

    Returns:
        Codes uint8 [E, N, K], scales [E, N, G], and zeros uint8 [E, N, G] or None.

    Raises:
        ArgumentError: Words that are too short for the weight's shape.
    """
    every = [codes_of(weight, expert, slice(0, weight.out_features)) for expert in range(weight.words.shape[0])]
    return torch.stack(every), *grid_of(weight)


def codes_of(weight: RepackedWeight, expert: int, rows: slice) -> Tensor:
    """uint8 [rows, K], the codes of some rows of one expert; no more than these and their blocks are unpacked."""
    words = weight.words[expert]
    if weight.layout == STREAM:
        return unpack(words[rows], weight.bits, weight.in_features)
    block = TILE_N if weight.layout == TILES else INT4PACK_ROWS
    first, last = rows.start // block, -(-rows.stop // block)
    if weight.layout == TILES:
        codes = _from_tiles(words[first:last], weight.bits)
    else:
        half = _known_block() // 2
        stretch = words[first * block : last * block].reshape(-1, weight.in_features, half)
        nibbles = torch.stack([stretch & 15, stretch >> 4], 1).transpose(-1, -2).flatten(0, 2)
        codes = nibbles - nibble_offset(weight.bits)
    return codes[rows.start - first * block : rows.stop - first * block, : weight.in_features]


def nibble_offset(bits: int) -> int:
    """How far codes of `bits` bits are moved up to make nibbles whose middle is 8."""
    return 8 - (1 << (bits - 1))


def grid_of(weight: RepackedWeight) -> tuple[Tensor, Tensor | None]:
    """scales [E, N, G] and zeros uint8 [E, N, G] or None, as they were prepared."""
    scales, zeros, count = weight.scales, weight.zeros, weight.in_features // weight.group_size
    if weight.layout == INT4PACK:
        scales = scales[..., 0].mT[:, : weight.out_features]
    elif weight.layout == TILES:
        scales = scales.mT[:, : weight.out_features, :count]
        zeros = None if zeros is None else zeros.mT[:, : weight.out_features, :count]
    return scales, zeros


@functools.cache
def int4pack_block() -> int | None:
    """Rows that torch's int4 order interleaves on this CPU: 64, 32, or None where it is an order not known here."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (2 * INT4PACK_ROWS, 32), generator=generator, dtype=torch.uint8)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1).flatten()
    return next((block for block in (64, 32) if torch.equal(_interleave(codes, block).flatten(), theirs)), None)


def _fastest(bits: int, scales: Tensor, inputs: int, dtype: torch.dtype, device: torch.device) -> str:
    if device.type == "cuda":
        return TILES
    fits = bits <= 4 and inputs // scales.shape[2] in INT4PACK_GROUPS and dtype == torch.bfloat16
    return INT4PACK if fits and device.type == "cpu" and scales.dtype == torch.bfloat16 and int4pack_block() else STREAM


def _to_int4pack(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    if scales.dtype != torch.bfloat16 or codes.shape[2] // scales.shape[2] not in INT4PACK_GROUPS:
        raise ArgumentError(
            f"scales is {scales.dtype} {list(scales.shape)} for {codes.shape[2]} inputs: layout {INT4PACK!r} takes "
            f"torch.bfloat16 and groups of {', '.join(map(str, INT4PACK_GROUPS))}; use {STREAM!r}"
        )
    rows = -codes.shape[1] % INT4PACK_ROWS
    words = _interleave(pad(codes + nibble_offset(bits), (0, 0, 0, rows)), _known_block())
    middle = float(1 << (bits - 1))
    offset = torch.zeros_like(scales) if zeros is None else ((middle - zeros.float()) * scales.float()).bfloat16()
    grid = pad(torch.stack([scales, offset], -1), (0, 0, 0, 0, 0, rows))
    return words, grid.transpose(1, 2).contiguous(), zeros


def _interleave(codes: Tensor, block: int) -> Tensor:
    """uint8 [..., N, K] -> uint8 [..., N, K / 2] in the order of torch's int4 product; N is whole blocks."""
    halves = codes.unflatten(-2, (-1, 2, block // 2))  # [..., blocks, 2, block / 2, K]
    octets = halves.select(-3, 0) | (halves.select(-3, 1) << 4)
    words: Tensor = octets.mT.contiguous().view(*codes.shape[:-1], codes.shape[-1] // 2)
    return words


def _known_block() -> int:
    block = int4pack_block()
    if block is None:
        raise ArgumentError(f"layout = {INT4PACK!r}: torch packs int4 in an unknown order on this CPU; use {STREAM!r}")
    return block


def _to_tiles(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
    group = codes.shape[2] // scales.shape[2]
    rows, columns = -codes.shape[1] % PAD_N, -codes.shape[2] % TILE_K
    codes = pad(codes, (0, columns, 0, rows))
    tiles = codes.unflatten(2, (-1, TILE_K)).unflatten(1, (-1, TILE_N)).transpose(2, 3)
    words = torch.cat([_plane(tiles, width, low) for width, low in planes(bits)], -1)
    groups = max(scales.shape[2], -(-codes.shape[2] // group))
    edge = (0, groups - scales.shape[2], 0, rows)
    grid = pad(scales, edge).mT.contiguous()
    return words, grid, None if zeros is None else pad(zeros, edge).mT.contiguous()


def _shares(width: int) -> list[slice]:
    """Which inputs of a slice stand in its words, in their order, for each share of a nibble of a plane this wide."""
    if width == 1:  # neighbours share a word, and so do halves
        return [slice(half + odd, half + 8, 2) for half in (0, 8) for odd in (0, 1)]
    return [slice(first, first + 4 * width) for first in range(0, SLICE, 4 * width)]


def _plane(tiles: Tensor, width: int, low: int) -> Tensor:
    """Bits low .. low + width of uint8 [..., 64, 128] as int32 [..., 64 * 4 width]."""
    slices = tiles.unflatten(-1, (-1, SLICE))
    words = torch.zeros((*slices.shape[:-2], 4 * width), dtype=torch.int32, device=tiles.device)
    for i in range(slices.shape[-2]):
        for share, inputs in enumerate(_shares(width)):
            words |= ((slices[..., i, inputs] >> low) & ((1 << width) - 1)).int() << (4 * i + width * share)
    return words.flatten(-2)


def _from_tiles(words: Tensor, bits: int) -> Tensor:
    """uint8 [rows, inputs], padded, of int32 [blocks, tiles, 256 bits]."""
    codes = torch.zeros((*words.shape[:2], TILE_N, TILE_K), dtype=torch.uint8, device=words.device)
    slices = codes.unflatten(-1, (-1, SLICE))
    for (width, low), plane in zip(planes(bits), words.split([256 * width for width, _ in planes(bits)], -1)):
        rows = plane.unflatten(-1, (TILE_N, 4 * width))
        for i in range(slices.shape[-2]):
            for share, inputs in enumerate(_shares(width)):
                fields = (rows >> (4 * i + width * share)) & ((1 << width) - 1)
                slices[..., i, inputs] |= fields.to(torch.uint8) << low
    return codes.transpose(1, 2).flatten(2).flatten(0, 1)

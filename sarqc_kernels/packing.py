"""Codes to 32-bit words and back: the only place that knows the bit order.

The order is the dense little-endian bit stream: element i of a row occupies bits [i * bits, (i + 1) * bits) of that
row, bit 0 being the lowest bit of the first word, and an element may straddle two words. For 2, 4 and 8 bits this is
the familiar "8 nibbles to a word, lowest first"; 3, 5, 6 and 7 bits waste nothing. Unused high bits of a row's last
word are zero.

The trick: whatever the width, 8 elements fill `bits` whole bytes and fit one 64-bit integer. So eight shifts build all
the integers of a tensor at once, and their first `bits` bytes laid end to end are the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sarqc_kernels.errors import ArgumentError

__all__ = ["pack", "unpack", "words_per_row"]

LANES = 8  # elements that share one 64-bit integer


def words_per_row(count: int, bits: int) -> int:
    """32-bit words that `count` codes of `bits` bits take: ceil(count * bits / 32)."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack rows of codes into words.

    codes: uint8 [..., n], each below 2^bits. bits: 2 to 8.
    Returns int32 [..., ceil(n * bits / 32)].
    Raises ArgumentError for another dtype or width, or for a code that does not fit (it would spill into its
    neighbours); looking for one waits for the device, so packing does not belong in a hot path.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() == 0:
        raise ArgumentError(f"codes is {codes.dtype} {list(codes.shape)}: pass uint8 with at least one dimension")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ArgumentError(f"codes holds {int(codes.max())}: {bits} bits take 0 to {(1 << bits) - 1}")
    count = codes.shape[-1]
    if count == 0:
        return codes.new_empty(codes.shape, dtype=torch.int32)
    lanes = pad(codes, (0, -count % LANES)).unflatten(-1, (-1, LANES))
    eights = torch.zeros(lanes.shape[:-1], dtype=torch.int64, device=codes.device)
    for lane in range(LANES):
        eights |= lanes[..., lane].to(torch.int64) << (lane * bits)
    stream = eights.view(torch.uint8).unflatten(-1, (-1, LANES))[..., :bits].flatten(-2)
    wanted = 4 * words_per_row(count, bits)  # bytes beyond the last code are zero, so cutting or padding is exact
    return pad(stream, (0, wanted - stream.shape[-1])).contiguous().view(torch.int32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row that `pack` wrote.

    words: int32 [..., w] with w >= ceil(count * bits / 32). Returns uint8 [..., count].
    Raises ArgumentError for another dtype or width, or for rows too short to hold `count` codes.
    """
    _check_bits(bits)
    if words.dtype != torch.int32 or words.dim() == 0:
        raise ArgumentError(f"words is {words.dtype} {list(words.shape)}: pass int32 with at least one dimension")
    if count < 0 or words.shape[-1] < words_per_row(count, bits):
        raise ArgumentError(
            f"count = {count} codes of {bits} bits need {words_per_row(count, bits)} words a row: words has {words.shape[-1]}"
        )
    eights = -(-count // LANES)
    stream = words.contiguous().view(torch.uint8)
    stream = pad(stream, (0, eights * bits - stream.shape[-1])).unflatten(-1, (eights, bits))
    integers = pad(stream, (0, LANES - bits)).view(torch.int64).squeeze(-1)
    codes = torch.empty((*words.shape[:-1], eights, LANES), dtype=torch.uint8, device=words.device)
    for lane in range(LANES):
        codes[..., lane] = (integers >> (lane * bits)) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count].contiguous()


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ArgumentError(f"bits = {bits} is out of range: use a whole number from 2 to 8")

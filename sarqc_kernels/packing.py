"""Codes to 32-bit words and back: the only place that knows the bit order.

The order is the dense little-endian bit stream: element i of a row occupies bits [i * bits, (i + 1) * bits) of that
row, bit 0 being the lowest bit of the first word, and an element may straddle two words. For 2, 4 and 8 bits this is
the familiar "8 nibbles to a word, lowest first"; 3, 5, 6 and 7 bits waste nothing. Unused high bits of a row's last
word are zero.

The trick: whatever the width, 8 codes fill `bits` whole bytes. Eight codes of a byte each are read as one 64-bit
integer, and three rounds of shift-and-mask push neighbours together: bytes to pairs, pairs to fours, fours to eight.
The first `bits` bytes of the integers, laid end to end, are the stream. Nothing is ever wider than the codes are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sarqc_kernels.checks import check_bits
from sarqc_kernels.errors import ArgumentError

__all__ = ["pack", "unpack", "unpack_padded", "words_of", "words_per_row"]

LANES = 8  # elements that share one 64-bit integer


def words_per_row(count: int, bits: int) -> int:
    """32-bit words that `count` codes of `bits` bits take: ceil(count * bits / 32)."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack rows of codes into words.

    Args:
        codes: uint8 [..., n], each below 2^bits.
        bits: 2 to 8.

    Returns:
        int32 [..., ceil(n * bits / 32)].

    Raises:
        ArgumentError: Another dtype or width, or a code that does not fit. The check of values waits for the device, so
            packing does not belong in a hot path.
    """
    check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() == 0:
        raise ArgumentError(f"codes is {codes.dtype} {list(codes.shape)}: pass uint8 with at least one dimension")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ArgumentError(f"codes holds {int(codes.max())}: {bits} bits take 0 to {(1 << bits) - 1}")
    return words_of(codes, bits)


def words_of(codes: Tensor, bits: int) -> Tensor:
    """`pack` of codes that are known to fit, such as an operation's own: nothing is looked at, nothing waits."""
    count = codes.shape[-1]
    if count == 0:
        return codes.new_empty(codes.shape, dtype=torch.int32)
    eights = _as_integers(pad(codes, (0, -count % LANES)))
    for low, high, shift in _rounds(bits):
        eights = (eights & low) | ((eights >> shift) & high)
    stream = eights.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)
    wanted = 4 * words_per_row(count, bits)  # bytes beyond the last code are zero, so cutting or padding is exact
    return _contiguous(pad(stream, (0, wanted - stream.shape[-1]))).view(torch.int32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row that `pack` wrote.

    Args:
        words: int32 [..., w] with w >= ceil(count * bits / 32).
        bits: 2 to 8.
        count: Codes of a row.

    Returns:
        uint8 [..., count].

    Raises:
        ArgumentError: Another dtype or width, or rows too short to hold `count` codes.
    """
    check_bits(bits)
    if words.dtype != torch.int32 or words.dim() == 0:
        raise ArgumentError(f"words is {words.dtype} {list(words.shape)}: pass int32 with at least one dimension")
    if count < 0 or words.shape[-1] < words_per_row(count, bits):
        raise ArgumentError(
            f"count = {count} codes of {bits} bits need {words_per_row(count, bits)} words a row: "
            f"words has {words.shape[-1]}"
        )
    lanes = -(-count // LANES)
    stream = _contiguous(words).view(torch.uint8)
    stream = pad(stream, (0, lanes * bits - stream.shape[-1])).unflatten(-1, (lanes, bits))
    eights = _as_integers(pad(stream, (0, LANES - bits))).squeeze(-1)
    for low, high, shift in reversed(_rounds(bits)):
        eights = (eights & low) | ((eights & high) << shift)
    return _contiguous(eights).view(torch.uint8)[..., :count].contiguous()


def unpack_padded(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of rows in which no code straddles two words: floor(32 / bits) to a word, lowest first.

    words: int32 [..., w] with w >= ceil(count / floor(32 / bits)). Returns uint8 [..., count]. Old files of 3, 5, 6 and
    7 bits look like this; nothing writes it any more. Raises ArgumentError as `unpack` does.
    """
    check_bits(bits)
    if words.dtype != torch.int32 or words.dim() == 0:
        raise ArgumentError(f"words is {words.dtype} {list(words.shape)}: pass int32 with at least one dimension")
    lanes = 32 // bits
    if count < 0 or words.shape[-1] * lanes < count:
        raise ArgumentError(
            f"count = {count} codes of {bits} bits, {lanes} to a word, need {-(-count // lanes)} words a row: "
            f"words has {words.shape[-1]}"
        )
    shifts = torch.arange(lanes, dtype=torch.int32, device=words.device) * bits
    codes = ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8)
    return codes.flatten(-2)[..., :count].contiguous()


def _rounds(bits: int) -> list[tuple[int, int, int]]:
    """For each round of packing: where the halves of every lane end up, and how far the high one moves."""
    rounds = []
    for lane in (16, 32, 64):
        width = bits * lane // 16
        low = sum(((1 << width) - 1) << start for start in range(0, 64, lane))
        if width < lane // 2:  # codes of 8 bits are packed as they are
            rounds.append((low, low << width, lane // 2 - width))
    return rounds


def _as_integers(octets: Tensor) -> Tensor:
    """uint8 [..., 8 n] -> int64 [..., n]."""
    return _contiguous(octets).view(torch.int64)


def _contiguous(tensor: Tensor) -> Tensor:
    """`tensor` with the strides of its shape: `.contiguous()` lets those of dimensions of size 1 be anything."""
    wanted = torch.empty(tensor.shape, device="meta").stride()
    return tensor if tensor.stride() == wanted else tensor.clone(memory_format=torch.contiguous_format)

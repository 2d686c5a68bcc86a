"""The bit stream: golden words, an oracle with Python's own big integers, and what must be refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sarqc_kernels import ArgumentError, pack, unpack
from sarqc_kernels.packing import words_per_row


def as_stream(row: list[int], bits: int) -> int:
    """A row of codes as one big integer: element i at bit i * bits."""
    return sum(code << (i * bits) for i, code in enumerate(row))


def test_golden_words_of_four_bits() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    words = pack(codes, 4).tolist()
    assert [word & 0xFFFFFFFF for word in words] == [0x76543210, 0xFEDCBA98]


def test_golden_words_of_three_bits_straddle() -> None:
    codes = torch.zeros(11, dtype=torch.uint8)
    codes[10] = 0b101  # bits 30, 31 and 32: the third one falls into the second word
    assert [word & 0xFFFFFFFF for word in pack(codes, 3).tolist()] == [0x40000000, 0b1]


@settings(deadline=None, max_examples=40)
@given(bits=st.integers(2, 8), count=st.integers(0, 99), rows=st.integers(0, 3), seed=st.integers(0, 2**31))
def test_round_trip_and_stream(bits: int, count: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, 2, count), generator=generator, dtype=torch.uint8)
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, 2, words_per_row(count, bits))
    assert torch.equal(unpack(words, bits, count), codes)
    for row, packed in zip(codes.flatten(0, 1).tolist(), words.flatten(0, 1).tolist()):
        assert as_stream(row, bits) == as_stream([word & 0xFFFFFFFF for word in packed], 32)


@pytest.mark.parametrize("bits", range(2, 9))
def test_views_pack_like_copies(bits: int, generator: torch.Generator) -> None:
    codes = torch.randint(0, 1 << bits, (37, 5, 2), generator=generator, dtype=torch.uint8)[..., 1].T
    words = pack(codes, bits)
    assert torch.equal(words, pack(codes.contiguous(), bits))
    wide = torch.stack([words, words], dim=-1)[..., 0]
    assert torch.equal(unpack(wide, bits, 37), codes)


def test_fewer_codes_than_the_words_hold(generator: torch.Generator) -> None:
    codes = torch.randint(0, 8, (4, 64), generator=generator, dtype=torch.uint8)
    for count in (0, 1, 13, 64):
        assert torch.equal(unpack(pack(codes, 3), 3, count), codes[:, :count])


@pytest.mark.parametrize("bits", [-1, 1, 9])
def test_refuses_other_widths(bits: int) -> None:
    with pytest.raises(ArgumentError, match=f"bits = {bits}"):
        pack(torch.zeros(8, dtype=torch.uint8), bits)
    with pytest.raises(ArgumentError, match=f"bits = {bits}"):
        unpack(torch.zeros(8, dtype=torch.int32), bits, 1)


def test_refuses_what_would_corrupt() -> None:
    with pytest.raises(ArgumentError, match="codes holds 8: 3 bits take 0 to 7"):
        pack(torch.tensor([1, 8], dtype=torch.uint8), 3)
    with pytest.raises(ArgumentError, match="uint8"):
        pack(torch.tensor([1, 2]), 4)
    with pytest.raises(ArgumentError, match="need 2 words"):
        unpack(torch.zeros(1, dtype=torch.int32), 4, 9)
    with pytest.raises(ArgumentError, match="int32"):
        unpack(torch.zeros(1, dtype=torch.int64), 4, 8)

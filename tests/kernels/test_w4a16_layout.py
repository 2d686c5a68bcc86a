"""Layouts hold the very codes that went in, pad without a trace, and are chosen by what can hold the weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sarqc_kernels import ArgumentError, pack
from sarqc_kernels.testing import random_quantized
from sarqc_kernels.w4a16 import repack, unpack_weight
from sarqc_kernels.w4a16.layout import LAYOUTS, codes_of, int4pack_block, planes


@settings(deadline=None, max_examples=30)
@given(
    layout=st.sampled_from(LAYOUTS), experts=st.integers(1, 3), rows=st.integers(1, 150), groups=st.integers(1, 5),
    group=st.sampled_from([32, 64, 128]), sym=st.booleans(), width=st.integers(2, 8), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_nothing_is_lost(
    layout: str, experts: int, rows: int, groups: int, group: int, sym: bool, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = min(width, 4) if layout == "int4pack" else width
    weight = random_quantized(
        generator, (experts, rows, groups * group), groups, bits, scale_dtype=torch.bfloat16, sym=sym
    )
    zeros = None if sym else weight.zeros
    ready = repack(weight.codes, weight.scales, zeros, bits=bits, layout=layout)
    codes, scales, result = unpack_weight(ready)
    assert torch.equal(codes, weight.codes) and torch.equal(scales, weight.scales)
    assert (result is None) if zeros is None else torch.equal(result, zeros)
    some = slice(rows // 3, rows)
    assert torch.equal(codes_of(ready, experts - 1, some), weight.codes[experts - 1, some])
    assert ready[3:] == (layout, bits, rows, groups * group, group)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_stream_takes_every_width(bits: int, generator: torch.Generator) -> None:
    weight = random_quantized(generator, (2, 7, 30), 3, bits)
    ready = repack(weight.codes, weight.scales, weight.zeros, bits=bits)
    assert ready.layout == "stream" and torch.equal(ready.words, pack(weight.codes, bits))
    assert torch.equal(unpack_weight(ready)[0], weight.codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_tiles_of_every_width(bits: int, generator: torch.Generator) -> None:
    weight = random_quantized(generator, (2, 70, 640), 5, bits, sym=False)
    ready = repack(weight.codes, weight.scales, weight.zeros, bits=bits, layout="tiles")
    assert all(torch.equal(*pair) for pair in zip(unpack_weight(ready), weight))
    some = slice(65, 68)
    assert torch.equal(codes_of(ready, 1, some), weight.codes[1, some])
    assert ready.words.numel() * 32 == 2 * 128 * 640 * bits


def test_planes_are_fours_then_what_is_left() -> None:
    assert [[width for width, _ in planes(bits)] for bits in range(2, 9)] == [
        [2], [2, 1], [4], [4, 1], [4, 2], [4, 2, 1], [4, 4],
    ]  # fmt: skip
    assert planes(7) == ((4, 0), (2, 4), (1, 6))


def test_three_bits_are_two_planes() -> None:
    codes = torch.zeros(1, 128, 256, dtype=torch.uint8)
    codes[0, 65, 128 + 16 * 5 + 11] = 6  # word 3 of eight, second share; word 1 of four, fourth share
    words = repack(codes, torch.ones(1, 128, 1), None, bits=3, layout="tiles").words
    assert words.shape == (1, 2, 2, 768) and int((words != 0).sum()) == 2
    assert words[0, 1, 1, 8 + 3] == 2 << (4 * 5 + 2) and words[0, 1, 1, 512 + 4 + 1] == 1 << (4 * 5 + 3)


def test_a_tile_as_documented() -> None:
    codes = torch.zeros(1, 200, 300, dtype=torch.uint8)
    codes[0, 70, 128 + 16 * 5 + 3] = 9
    ready = repack(codes, torch.ones(1, 200, 1), None, bits=4, layout="tiles")
    assert ready.words.shape == (1, 4, 3, 1024) and ready.words.dtype == torch.int32
    assert ready.words[0, 1, 1, 6 * 16 + 3] == 9 << 20 and int((ready.words != 0).sum()) == 1
    assert ready.scales.shape[2] == 256


def test_torch_agrees_on_its_own_order(generator: torch.Generator) -> None:
    assert int4pack_block() in (32, 64)
    codes = torch.randint(0, 16, (1, 192, 96), generator=generator, dtype=torch.uint8)
    ready = repack(codes, torch.ones(1, 192, 3, dtype=torch.bfloat16), None, bits=4, layout="int4pack")
    assert torch.equal(ready.words[0], torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes[0].int(), 1))


def test_the_fastest_that_can_hold_it() -> None:
    codes = torch.zeros(1, 8, 128, dtype=torch.uint8)
    bf16 = torch.bfloat16
    for bits, groups, scale_dtype, dtype, want in (
        (4, 2, bf16, bf16, "int4pack"),
        (4, 2, bf16, torch.float32, "stream"),
        (4, 2, torch.float16, bf16, "stream"),
        (4, 8, bf16, bf16, "stream"),
        (3, 2, bf16, bf16, "int4pack"),
        (2, 2, bf16, torch.float32, "stream"),
        (8, 2, bf16, bf16, "stream"),
    ):
        scales = torch.ones(1, 8, groups, dtype=scale_dtype)
        assert repack(codes, scales, None, bits=bits, dtype=dtype).layout == want


@pytest.mark.parametrize("layout", ["int4pack", "tiles"])
def test_refuses_what_it_cannot_hold(layout: str) -> None:
    codes, scales = torch.zeros(1, 8, 64, dtype=torch.uint8), torch.ones(1, 8, 2, dtype=torch.bfloat16)
    if layout == "int4pack":
        with pytest.raises(ArgumentError, match="holds 2, 3, 4 bits, not 5"):
            repack(codes, scales, None, bits=5, layout=layout)
    with pytest.raises(ArgumentError, match="codes holds 16"):
        repack(codes + 16, scales, None, bits=4, layout=layout)
    with pytest.raises(ArgumentError, match="layout = 'marlin' is not known"):
        repack(codes, scales, None, bits=4, layout="marlin")
    with pytest.raises(ArgumentError, match="codes is"):
        repack(codes.int(), scales, None, bits=4, layout=layout)
    with pytest.raises(ArgumentError, match="scales is"):
        repack(codes, scales[:, :7], None, bits=4, layout=layout)
    with pytest.raises(ArgumentError, match="bits = 1"):
        repack(codes, scales, None, bits=1, layout=layout)
    if layout == "int4pack":
        with pytest.raises(ArgumentError, match="scales is torch"):
            repack(codes, scales.half(), None, bits=4, layout=layout)

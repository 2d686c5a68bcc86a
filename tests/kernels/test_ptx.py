"""Inline PTX of dequantization, emulated: every field of every plane is its power of two and the bits of the code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sarqc_kernels.w4a16.layout import planes
from tests.kernels import ptx

unpack = pytest.importorskip("sarqc_kernels.w4a16.triton.unpack")

PLANES = sorted({plane for bits in range(2, 9) for plane in planes(bits)})
WORDS = 4096


def plain(function):
    """A function that Triton runs when it compiles, as Python."""
    return getattr(function, "fn", function)


@pytest.mark.parametrize("half", [False, True], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("width", "low"), PLANES)
def test_fields_are_above_a_power_of_two(width: int, low: int, half: bool, generator: torch.Generator) -> None:
    words = torch.randint(-(1 << 31), 1 << 31, (2, WORDS), generator=generator).to(torch.int32).numpy()
    text, power = plain(unpack.dequant_ptx)(width, low, half), plain(unpack.magic_of)(width, low, half)[2]
    fields = 32 // width
    result = ptx.elementwise(text, [words], [np.uint16] * fields, 2)
    dtype = torch.float16 if half else torch.bfloat16
    for field, bits in enumerate(result):
        values = torch.from_numpy(bits.view(np.int16)).view(dtype).double()
        code = torch.from_numpy(words.view(np.uint32).astype(np.int64)) >> field * width & ((1 << width) - 1)
        assert torch.equal(values, power + (code << low).double())


def test_instructions_do_what_the_manual_says() -> None:
    one, two = np.array([0x33221100], np.uint32), np.array([0x77665544], np.uint32)
    (joined,) = ptx.run("{ prmt.b32 $0, $1, $2, 0x5410; }", [one, two], 1)
    assert joined[0] == 0x55441100
    (logic,) = ptx.run("{ lop3.b32 $0, $1, 0xF0, 0x1, 0xEA; }", [one | np.uint32(0x5A)], 1)
    assert logic[0] == (0x3322115A & 0xF0 | 1)
    with pytest.raises(NotImplementedError, match="mul"):
        ptx.run("{ mul.b32 $0, $1, $2; }", [one, two], 1)

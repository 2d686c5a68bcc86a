"""W4A16: identity activations show the weight; then float64, ragged experts, tiles, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sarqc_kernels import ArgumentError, pack, w4a16_matmul
from sarqc_kernels.testing import (
    Quantized,
    dequantize,
    poisoned_empty,
    product_bound,
    random_quantized,
    uneven_offsets,
)
from sarqc_kernels.w4a16 import reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def packed(weight: Quantized, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    return pack(weight.codes, bits), weight.scales, weight.zeros


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_identity_shows_the_weight(bits: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = random_quantized(generator, (1, 37, 48), 3, bits, sym=False)
    with poisoned_empty():
        out = w4a16_matmul(torch.eye(48, dtype=dtype), *packed(weight, bits), None, None, bits=bits)
    assert out.dtype == dtype
    assert torch.equal(out.T, dequantize(weight)[0].to(dtype))


def test_no_zeros_means_the_middle_code(generator: torch.Generator) -> None:
    weight = random_quantized(generator, (1, 8, 32), 2, 3)
    qweight, scales, zeros = packed(weight, 3)
    x = torch.randn(5, 32, generator=generator)
    given = w4a16_matmul(x, qweight, scales, zeros, None, None, bits=3)
    assert torch.equal(given, w4a16_matmul(x, qweight, scales, None, None, None, bits=3))


@settings(deadline=None, max_examples=25)
@given(
    bits=st.integers(2, 8), tokens=st.integers(0, 20), rows=st.integers(1, 40), groups=st.integers(1, 5),
    group=st.integers(1, 40), experts=st.integers(1, 4), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_within_the_bound_of_float64(
    bits: int, tokens: int, rows: int, groups: int, group: int, experts: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = random_quantized(generator, (experts, rows, groups * group), groups, bits, sym=False)
    x = torch.randn(tokens, groups * group, generator=generator).to(dtype)
    bias = torch.randn(experts, rows, generator=generator)
    offsets = uneven_offsets(generator, tokens, experts)
    out = w4a16_matmul(x, *packed(weight, bits), offsets, bias, bits=bits)
    assert out.shape == (tokens, rows) and out.dtype == dtype
    for expert in range(experts):
        mine = slice(int(offsets[expert]), int(offsets[expert + 1]))
        values = dequantize(weight)[expert].to(dtype).double()
        exact = x[mine].double() @ values.T + bias[expert].to(dtype).double()
        # the fp32 sum, with the bias as one more term; then at most two roundings to dtype (some BLAS add it apart)
        sums = product_bound(x[mine], values.T) + torch.finfo(torch.float32).eps * (exact.abs() + bias[expert].abs())
        product = exact - bias[expert].to(dtype).double()
        roundings = torch.finfo(dtype).eps * (exact.abs() + product.abs()) + torch.finfo(dtype).tiny
        assert ((out[mine].double() - exact).abs() <= 2 * sums + roundings).all()


def test_experts_give_the_bits_of_dense_calls(generator: torch.Generator) -> None:
    weight = random_quantized(generator, (4, 24, 64), 2, 4)
    qweight, scales, zeros = packed(weight, 4)
    x = torch.randn(50, 64, generator=generator)
    offsets = uneven_offsets(generator, 50, 4)
    out = w4a16_matmul(x, qweight, scales, zeros, offsets, None, bits=4)
    for e in range(4):
        at, one = slice(int(offsets[e]), int(offsets[e + 1])), slice(e, e + 1)
        alone = w4a16_matmul(x[at], qweight[one], scales[one], zeros[one], None, None, bits=4)
        assert torch.equal(out[at], alone)


def test_rows_outside_of_the_offsets(generator: torch.Generator) -> None:
    weight = random_quantized(generator, (2, 6, 8), 1, 4)
    x = torch.full((10, 8), float("nan"))
    x[2:7] = 1.0
    with poisoned_empty():
        out = w4a16_matmul(x, *packed(weight, 4), torch.tensor([2, 2, 7]), None, bits=4)
    assert out[2:7].isfinite().all() and not out[:2].any() and not out[7:].any()


@pytest.mark.parametrize("bias", [False, True])
def test_tiles_cover_every_row(bias: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    weight = random_quantized(generator, (1, 301, 24), 3, 3)
    b = torch.randn(1, 301, generator=generator).bfloat16() if bias else None
    x = torch.eye(24, dtype=torch.bfloat16)
    want = w4a16_matmul(x, *packed(weight, 3), None, b, bits=3)
    monkeypatch.setattr(reference, "TILE", 1)
    assert reference.LEAST_ROWS < 301
    assert torch.equal(w4a16_matmul(x, *packed(weight, 3), None, b, bits=3), want)


def test_refuses_what_does_not_fit(generator: torch.Generator) -> None:
    qweight, scales, zeros = packed(random_quantized(generator, (2, 6, 16), 2, 4), 4)
    x, offsets, bias = torch.zeros(5, 16), torch.tensor([0, 1, 5]), torch.zeros(2, 6)
    good = (x, qweight, scales, zeros, offsets, bias)
    w4a16_matmul(*good, bits=4)
    for at, bad, words in (
        (0, x.double(), "x is torch.float64"),
        (0, x[:, :15], "qweight is|scales is"),
        (1, qweight.long(), "qweight is torch.int64"),
        (2, scales[:, :, :1].expand(2, 6, 3), "scales is"),
        (3, zeros.int(), "zeros is torch.int32"),
        (4, None, "offsets is None with 2 experts"),
        (4, torch.tensor([0, 1, 6]), "do not cut 5 rows"),
        (5, bias[:1], "bias is"),
        (5, bias.to("meta"), "bias is on meta"),
    ):
        broken = [*good[:at], bad, *good[at + 1 :]]
        with pytest.raises(ArgumentError, match=words):
            w4a16_matmul(*broken, bits=4)
    with pytest.raises(ArgumentError, match="bits = 1"):
        w4a16_matmul(*good, bits=1)


def test_opcheck(generator: torch.Generator) -> None:
    qweight, scales, zeros = packed(random_quantized(generator, (2, 6, 16), 2, 4), 4)
    x = torch.randn(5, 16, generator=generator)
    op = torch.ops.sarqc.w4a16_matmul.default
    torch.library.opcheck(op, (x, qweight, scales, zeros, torch.tensor([0, 0, 5]), torch.zeros(2, 6), 4))
    torch.library.opcheck(op, (x, qweight[:1], scales[:1], None, None, None, 4))

"""The repaired interpreter against torch: bf16 casts bit for bit, bf16 products, refusal of raw bf16 arithmetic."""

# mypy: disable-error-code="name-defined"
# `tl` is what importorskip gives; types of a kernel are Triton's own.

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import round_to_bf16, widen_bf16

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def cast_kernel(source, target, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(source + at, mask=at < count)
    tl.store(target + at, values.to(target.dtype.element_ty), mask=at < count)


@triton.jit
def dot_kernel(a, b, c, steps, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    square = at[:, None] * SIZE + at[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for _ in range(steps):
        total = tl.dot(tl.load(a + square), tl.load(b + square), total)
    tl.store(c + square, total)


@triton.jit
def arithmetic_kernel(a, b, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(out + at, x + y)
    tl.store(out + BLOCK + at, x - y)
    tl.store(out + 2 * BLOCK + at, x * y)
    tl.store(out + 3 * BLOCK + at, tl.where(x < y, x, y))


@triton.jit
def fused_kernel(a, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(a + at)
    tl.store(a + at, tl.fma(value, value, value))


@triton.jit
def masked_kernel(a, first, stop, BLOCK: tl.constexpr):
    """Writes 1 to elements below `stop`, in calls with first > 0 alone."""
    at = tl.arange(0, BLOCK)
    mask = (at < stop) & (first > 0)
    tl.store(a + at, tl.load(a + at, mask=mask, other=0.0) + 1.0, mask=mask)


@triton.jit
def touching_kernel(a, b, read, write, size, BLOCK: tl.constexpr):
    """Program i reads from i * read on and writes from i * write on."""
    at = tl.arange(0, BLOCK)
    i = tl.program_id(0)
    value = tl.load(a + i * read + at, mask=i * read + at < size)
    tl.store(b + i * write + at, value, mask=at >= 0)


SPECIAL = [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 3.3895e38, 3.4e38, 1e-40, float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.int32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.int32),
    ],
    ids=str,
)
def test_casts_round_as_torch_does(source, target, device, generator):
    values = torch.randn(1000, generator=generator) * 100
    if not {source, target} & {torch.int32}:
        values = torch.cat([values, torch.tensor(SPECIAL)])
    values = values.to(source).to(device)
    result = torch.empty(len(values), dtype=target, device=device)
    cast_kernel[(1,)](values, result, len(values), BLOCK=1024)
    expected = values.to(target)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result[~result.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot_is_exact_where_it_can_be(dtype, device, generator):
    a, b = (torch.randint(-8, 9, (32, 32), generator=generator).to(dtype).to(device) for _ in range(2))
    c = torch.empty(32, 32, device=device)
    dot_kernel[(1,)](a, b, c, 3, SIZE=32)
    assert torch.equal(c, 3 * (a.float() @ b.float()))


def test_bf16_arithmetic_rounds_once(device, generator):
    a, b = (torch.randn(1024, generator=generator).bfloat16().to(device) for _ in range(2))
    out = torch.empty(4, 1024, dtype=torch.bfloat16, device=device)
    arithmetic_kernel[(1,)](a, b, out, BLOCK=1024)
    assert torch.equal(out, torch.stack([a + b, a - b, a * b, torch.minimum(a, b)]))


def test_other_bf16_arithmetic_is_refused(device):
    if device == "cuda":
        pytest.skip("a GPU multiplies and adds bf16 as it should")
    with pytest.raises(Exception, match="widen with"):
        fused_kernel[(1,)](torch.ones(16, dtype=torch.bfloat16), BLOCK=16)


@pytest.mark.parametrize("first", [0, 3])
def test_a_scalar_masks_a_block(first, device):
    values = torch.zeros(16, device=device)
    masked_kernel[(1,)](values, first, 10, BLOCK=16)
    assert values.tolist() == [float(first > 0)] * 10 + [0.0] * 6


def test_bits_agree_with_torch(generator):
    values = torch.cat([torch.randn(4096, generator=generator), torch.tensor(SPECIAL)])
    bits = torch.from_numpy(round_to_bf16(values.numpy()).view("int16")).view(torch.bfloat16)
    expected = values.bfloat16()
    assert torch.equal(bits.isnan(), expected.isnan())
    assert torch.equal(bits[~bits.isnan()], expected[~expected.isnan()])
    widened = torch.from_numpy(widen_bf16(expected.view(torch.int16).numpy()))
    assert torch.equal(widened.nan_to_num(7.0), expected.float().nan_to_num(7.0))


@pytest.mark.parametrize(
    ("same", "read", "write", "size", "words"),
    [
        (False, 16, 16, 48, None),
        (False, 0, 16, 16, None),
        (False, 16, 16, 49, "reads beside all tensors"),
        (False, 16, 17, 48, "writes beside all tensors"),
        (False, 16, 15, 48, "writes what another program writes"),
        (True, 0, 16, 48, "reads what another program writes"),
        (True, 16, 0, 48, "writes what another program"),
        (True, 16, 16, 48, None),
    ],
)
def test_bounds_and_races_are_watched(same, read, write, size, words, device):
    """Three programs of 16 elements. A tensor that is read by all, or changed by its owner, is fine."""
    if device == "cuda":
        pytest.skip("of the interpreter")
    a = torch.arange(48.0)
    call = (a, a if same else torch.zeros(48), read, write, size)
    if words is None:
        touching_kernel[(3,)](*call, BLOCK=16)
        return
    with pytest.raises(Exception, match=words):
        touching_kernel[(4 if size > 48 else 3,)](*call, BLOCK=16)

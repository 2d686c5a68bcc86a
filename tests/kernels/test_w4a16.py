"""W4A16, each implementation: identity shows the weight; float64; ragged experts; odd shapes; what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sarqc_kernels import ArgumentError, BackendError, w4a16_matmul
from sarqc_kernels.testing import (
    Quantized,
    dequantize,
    poisoned_empty,
    product_bound,
    random_quantized,
    uneven_offsets,
)
from sarqc_kernels.w4a16 import RepackedWeight, cpu, reference, repack

BACKENDS = ("reference", "cpu", "triton")
LAYOUT = {"reference": "stream", "cpu": "int4pack", "triton": "tiles"}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def prepared(weight: Quantized, backend: str, device: str, *, sym: bool = False, bits: int = 4) -> RepackedWeight:
    if backend == "cpu" and device != "cpu":
        pytest.skip("the CPU's own tests run where the kernel tests are on the CPU")
    zeros = None if sym else weight.zeros
    return repack(weight.codes, weight.scales, zeros, bits=bits, device=device, layout=LAYOUT[backend])


def check(
    out: Tensor, x: Tensor, weight: Quantized, offsets: Tensor | None, bias: Tensor | None, backend: str, bits: int = 4
) -> None:
    """out is within the contract's rounding of the product in float64, expert by expert.

    Weights: at most one rounding to x's dtype. The sum in fp32 in any order, the bias one more term of it. Then at most
    two roundings to x's dtype. torch's int4 product also rounds (middle - zero) * scale to bf16, by 2^-9 of it.
    """
    middle = float(1 << (bits - 1))
    eps, tiny = torch.finfo(x.dtype).eps, torch.finfo(x.dtype).tiny
    bounds = [0, len(x)] if offsets is None else offsets.tolist()
    for expert, values in enumerate(dequantize(weight).double()):
        mine = slice(bounds[expert], bounds[expert + 1])
        rows = x[mine].double()
        exact = product = rows @ values.T
        if bias is not None:
            exact = product + bias[expert].to(x.dtype).double()
        slack = eps / 2 * (rows.abs() @ values.abs().T) + 2 * product_bound(rows, values.T) + 2 * exact.abs() * 2.0**-23
        if backend == "cpu":
            offset = (middle - weight.zeros[expert].double()).abs() * weight.scales[expert].double()
            slack += rows.abs() @ offset.repeat_interleave(values.shape[1] // offset.shape[1], 1).T * 2.0**-9
        slack += eps * (exact.abs() + product.abs()) + tiny
        assert ((out[mine].double() - exact).abs() <= slack).all()


CASES = [
    # experts, rows, inputs, groups, sym, tokens, bias: odd rows, broken tiles, groups of 32, 64, 128 and a row
    (1, 70, 256, 8, True, 1, False),
    (1, 33, 192, 3, False, 2, True),
    (1, 130, 1024, 8, True, 3, True),
    (1, 100, 288, 9, False, 21, False),
    (1, 64, 256, 1, True, 70, False),
    (3, 40, 128, 2, False, 19, False),
    (4, 40, 256, 2, True, 5, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_within_the_bound_of_float64(
    case: tuple, dtype: torch.dtype, backend: str, device: str, generator: torch.Generator
) -> None:
    experts, rows, inputs, groups, sym, tokens, biased = case
    if backend == "cpu" and (dtype != torch.bfloat16 or inputs // groups > 256):
        pytest.skip("torch's int4 product takes bf16 and groups up to 256")
    weight = random_quantized(generator, (experts, rows, inputs), groups, 4, sym=sym, scale_dtype=torch.bfloat16)
    x = torch.randn(tokens, inputs, generator=generator).to(dtype)
    bias = torch.randn(experts, rows, generator=generator).to(dtype) if biased else None
    offsets = uneven_offsets(generator, tokens, experts) if experts > 1 else None
    args = [None if part is None else part.to(device) for part in (x, offsets, bias)]
    with poisoned_empty():
        out = w4a16_matmul(args[0], prepared(weight, backend, device, sym=sym), *args[1:], backend=backend)
    assert out.shape == (tokens, rows) and out.dtype == dtype
    check(out.cpu(), x, weight, offsets, bias, backend)
    again = w4a16_matmul(args[0], prepared(weight, backend, device, sym=sym), *args[1:], backend=backend)
    assert torch.equal(out, again)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_identity_shows_the_weight(
    sym: bool, groups: int, backend: str, device: str, generator: torch.Generator
) -> None:
    weight = random_quantized(generator, (1, 75, 128), groups, 4, sym=sym, scale_dtype=torch.bfloat16)
    if backend == "cpu" and not sym:  # its offsets are rounded; powers of two and 0 are not
        weight.zeros.fill_(4)
    eye = torch.eye(128, dtype=torch.bfloat16, device=device)
    ready = prepared(weight, backend, device, sym=sym)
    values = dequantize(weight)[0].T.bfloat16()
    with poisoned_empty():
        assert torch.equal(w4a16_matmul(eye, ready, backend=backend).cpu(), values)
        assert torch.equal(w4a16_matmul(eye[5:7], ready, backend=backend).cpu(), values[5:7])


def test_experts_give_the_bits_of_dense_calls(backend: str, device: str, generator: torch.Generator) -> None:
    weight = random_quantized(generator, (4, 24, 128), 2, 4, scale_dtype=torch.bfloat16)
    x = torch.randn(40, 128, generator=generator).bfloat16()
    offsets = torch.tensor([0, 17, 17, 20, 40])
    out = w4a16_matmul(x.to(device), prepared(weight, backend, device), offsets.to(device), backend=backend)
    for e in (0, 3):
        at, one = slice(int(offsets[e]), int(offsets[e + 1])), slice(e, e + 1)
        alone = prepared(Quantized(*(part[one] for part in weight)), backend, device)
        assert torch.equal(out[at], w4a16_matmul(x[at].to(device), alone, backend=backend))


@pytest.mark.parametrize("tokens", [7, 12])
def test_rows_outside_of_the_offsets(tokens: int, backend: str, device: str, generator: torch.Generator) -> None:
    weight = random_quantized(generator, (2, 6, 1024), 8, 4, scale_dtype=torch.bfloat16)
    x = torch.full((tokens + 3, 1024), float("nan"), dtype=torch.bfloat16)
    x[2:tokens] = 1.0
    offsets = torch.tensor([2, 2, tokens], device=device)
    with poisoned_empty():
        out = w4a16_matmul(x.to(device), prepared(weight, backend, device), offsets, backend=backend)
    assert out[2:tokens].isfinite().all() and not out[:2].any() and not out[tokens:].any()


def test_a_weight_in_any_layout_is_one_weight(device: str, generator: torch.Generator) -> None:
    weight = random_quantized(generator, (2, 40, 128), 2, 4, sym=False, scale_dtype=torch.bfloat16)
    x = torch.randn(9, 128, generator=generator).bfloat16().to(device)
    offsets = torch.tensor([0, 4, 9], device=device)
    layouts = ("stream", "tiles", "int4pack")
    outs = [
        w4a16_matmul(
            x,
            repack(weight.codes, weight.scales, weight.zeros, bits=4, layout=layout, device=device),
            offsets,
            backend="reference",
        )
        for layout in layouts
    ]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("bias", [False, True])
def test_tiles_of_the_reference_cover_every_row(
    bias: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    weight = random_quantized(generator, (1, 301, 24), 3, 3)
    b = torch.randn(1, 301, generator=generator).bfloat16() if bias else None
    x, ready = torch.eye(24, dtype=torch.bfloat16), prepared(weight, "reference", "cpu", bits=3)
    want = w4a16_matmul(x, ready, None, b)
    monkeypatch.setattr(reference, "TILE", 1)
    assert reference.LEAST_ROWS < 301
    assert torch.equal(w4a16_matmul(x, ready, None, b), want)


@pytest.mark.parametrize("tokens", [3, cpu.FEW + 1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_narrow_codes_through_the_int4_product(bits: int, sym: bool, tokens: int, generator: torch.Generator) -> None:
    weight = random_quantized(generator, (3, 70, 128), 2, bits, sym=sym, scale_dtype=torch.bfloat16)
    x = torch.randn(3 * tokens, 128, generator=generator).bfloat16()
    offsets = torch.tensor([0, tokens, 2 * tokens, 3 * tokens])
    ready = prepared(weight, "cpu", "cpu", sym=sym, bits=bits)
    with poisoned_empty():
        out = w4a16_matmul(x, ready, offsets, backend="cpu")
    check(out, x, weight, offsets, None, "cpu", bits)
    if sym:  # then no offset is rounded: identity shows the weight
        eye = torch.eye(128, dtype=torch.bfloat16)
        shown = w4a16_matmul(eye, ready, torch.tensor([0, 0, 128, 128]), backend="cpu")
        assert torch.equal(shown, dequantize(weight)[1].T.bfloat16())


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_tiles_of_the_cpu_cover_every_row(
    amx: bool, biased: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    weight = random_quantized(generator, (1, 301, 64), 2, 4, sym=False, scale_dtype=torch.bfloat16)
    x = torch.randn(cpu.FEW + 1, 64, generator=generator).bfloat16()
    bias = torch.randn(1, 301, generator=generator).bfloat16() if biased else None
    monkeypatch.setattr(cpu, "TILE", 1)
    monkeypatch.setattr(cpu, "_product_dtype", lambda: torch.bfloat16 if amx else torch.float32)
    check(w4a16_matmul(x, prepared(weight, "cpu", "cpu"), None, bias, backend="cpu"), x, weight, None, bias, "cpu")


def test_a_strided_input(backend: str, device: str, generator: torch.Generator) -> None:
    weight = prepared(random_quantized(generator, (1, 16, 64), 1, 4, scale_dtype=torch.bfloat16), backend, device)
    wide = torch.randn(3, 128, generator=generator).bfloat16().to(device)
    out = w4a16_matmul(wide[:, ::2], weight, backend=backend)
    assert torch.equal(out, w4a16_matmul(wide[:, ::2].contiguous(), weight, backend=backend))


@pytest.mark.parametrize("tokens", [3, 40])
def test_strided_offsets_and_bias(tokens: int, backend: str, device: str, generator: torch.Generator) -> None:
    weight = random_quantized(generator, (3, 16, 64), 1, 4, scale_dtype=torch.bfloat16)
    ready = prepared(weight, backend, device)
    x = torch.randn(tokens, 64, generator=generator).bfloat16().to(device)
    offsets = torch.tensor([0, 9, 1, 9, 3, 9, tokens, 9], device=device)[::2]
    bias = torch.randn(16, 3, generator=generator).bfloat16().to(device).T
    out = w4a16_matmul(x, ready, offsets, bias, backend=backend)
    assert torch.equal(out, w4a16_matmul(x, ready, offsets.contiguous(), bias.contiguous(), backend=backend))


def test_refuses_what_does_not_fit(generator: torch.Generator) -> None:
    weight = prepared(random_quantized(generator, (2, 6, 16), 2, 4), "reference", "cpu")
    x, offsets, bias = torch.zeros(5, 16), torch.tensor([0, 1, 5]), torch.zeros(2, 6)
    w4a16_matmul(x, weight, offsets, bias)
    for bad, words in (
        ((x.double(), weight, offsets, bias), "x is torch.float64"),
        ((x[:, :15], weight, offsets, bias), r"x is torch.float32 \[5, 15\]"),
        ((x, weight, None, bias), "offsets is None with 2 experts"),
        ((x, weight, torch.tensor([0, 1, 6]), bias), "do not cut 5 rows"),
        ((x, weight, offsets, bias[:1]), "bias is"),
        ((x, weight, offsets, bias.to("meta")), "bias is on meta"),
    ):
        with pytest.raises(ArgumentError, match=words):
            w4a16_matmul(*bad)


@pytest.mark.parametrize("layout", ["int4pack", "tiles"])
def test_refuses_a_slice_of_a_repacked_weight(layout: str, generator: torch.Generator) -> None:
    """Kernels take pointers: a shard that is a view would be read wrongly."""
    weight = random_quantized(generator, (1, 128, 256), 4, 4, scale_dtype=torch.bfloat16)
    ready = repack(weight.codes, weight.scales, weight.zeros, bits=4, layout=layout)
    x = torch.zeros(2, 256, dtype=torch.bfloat16)
    for part in ("words", "scales", "zeros"):
        view = getattr(ready, part).repeat_interleave(2, -1)[..., ::2]
        with pytest.raises(ArgumentError, match=rf"weight\.{part} has strides"):
            w4a16_matmul(x, ready._replace(**{part: view}))


def test_a_backend_says_why_not(generator: torch.Generator) -> None:
    weight = random_quantized(generator, (1, 6, 64), 2, 4, scale_dtype=torch.bfloat16)
    x = torch.zeros(5, 64)
    for backend, layout, dtype, reason in (
        ("cpu", "stream", torch.bfloat16, "lies as 'stream'"),
        ("cpu", "int4pack", torch.float32, "x is torch.float32"),
        ("cuda", "stream", torch.bfloat16, "TRITON_INTERPRET is set|tensors are on cpu"),
    ):
        ready = repack(weight.codes, weight.scales, None, bits=4, layout=layout)
        with pytest.raises(BackendError, match=reason):
            w4a16_matmul(x.to(dtype), ready, backend=backend)


def test_triton_says_why_not(device: str, generator: torch.Generator) -> None:
    pytest.importorskip("triton")
    x = torch.zeros(5, 72, device=device)
    for layout, dtype, reason in (
        ("stream", torch.bfloat16, "lies as 'stream'"),
        ("tiles", torch.float32, "x is torch.float32"),
        ("tiles", torch.float16, "groups of 24 do not fit"),
    ):
        weight = random_quantized(generator, (1, 6, 72), 3, 4)
        ready = repack(weight.codes, weight.scales, None, bits=4, layout=layout, device=device)
        with pytest.raises(BackendError, match=reason):
            w4a16_matmul(x.to(dtype), ready, backend="triton")


@pytest.mark.parametrize("layout", ["stream", "int4pack"])
def test_opcheck(layout: str, generator: torch.Generator) -> None:
    weight = random_quantized(generator, (2, 16, 64), 2, 4, scale_dtype=torch.bfloat16)
    x = torch.randn(5, 64, generator=generator).bfloat16()
    op = torch.ops.sarqc.w4a16_matmul.default
    ready = repack(weight.codes, weight.scales, weight.zeros, bits=4, layout=layout)
    torch.library.opcheck(op, (x, *ready, torch.tensor([0, 0, 5]), torch.zeros(2, 16)))
    alone = repack(weight.codes[:1], weight.scales[:1], None, bits=4, layout=layout)
    torch.library.opcheck(op, (x, *alone, None, None))

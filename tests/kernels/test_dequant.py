"""Source weights expanded: every code against its definition, weights against transformers and compressed-tensors.

The foreign code is the oracle: it is what a checkpoint is loaded with elsewhere, and equality is to the bit.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sarqc_kernels import ArgumentError, dequantize_fp4, dequantize_fp8
from sarqc_kernels.dequant import _dequantize
from sarqc_kernels.dequant.reference import E2M1
from sarqc_kernels.testing import poisoned_empty

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning:triton")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn


def same(ours: Tensor, theirs: Tensor) -> bool:
    """The same bits, whatever NaN's are."""
    size = {2: torch.int16, 4: torch.int32}[ours.element_size()]
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    return bool(((ours.view(size) == theirs.contiguous().view(size)) | (ours.isnan() & theirs.isnan())).all())


def fp8(generator: torch.Generator, *shape: int) -> Tensor:
    """Every finite code of float8_e4m3fn is as likely as any other."""
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.where((codes & 0x7F) == 0x7F, 0, codes).to(torch.uint8).view(FP8)


def octets(generator: torch.Generator, *shape: int, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)


def fp8_scales(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator) * 1e-3 + 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_fp8_code(dtype: torch.dtype, backend: str, device: str) -> None:
    """By the definition of the format: sign, 4 bits of exponent with bias 7, 3 bits of mantissa, no infinity."""

    def value(code: int) -> float:
        sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
        if code & 127 == 127:
            return math.nan
        return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))

    codes = torch.arange(256, dtype=torch.uint8).view(FP8).view(2, 128).to(device)
    got = dequantize_fp8(codes, torch.tensor([1.0], device=device), dtype=dtype, backend=backend)
    assert same(got.cpu().flatten(), torch.tensor([value(code) for code in range(256)]).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_fp4_code_at_every_exponent(dtype: torch.dtype, backend: str, device: str) -> None:
    """16 codes times 255 powers of two, among them subnormal ones; 255 is not a number."""
    packed = torch.tensor([low | high << 4 for low in range(0, 16, 2) for high in (low + 1,)], dtype=torch.uint8)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].to(device)
    got = dequantize_fp4(packed.expand(256, -1).contiguous().to(device), scales, dtype=dtype, backend=backend).cpu()
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)
    powers = torch.tensor([2.0 ** (code - 127) for code in range(255)], dtype=torch.float64)
    assert same(got[:255], (powers[:, None] * values).float().to(dtype))
    assert not got[255].isfinite().any()


@pytest.mark.parametrize("shape", [(2, 256, 384), (1, 200, 130), (3, 7, 5)], ids=str)
def test_fp8_blocks_like_compressed_tensors(shape, backend: str, device: str, generator: torch.Generator) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    weight = fp8(generator, *shape)
    scales = fp8_scales(generator, shape[0], -(-shape[1] // 128), -(-shape[2] // 128))
    theirs = FP8BlockDequantizer(weight_block_size=[128, 128], dtype=torch.bfloat16)
    with poisoned_empty():
        got = dequantize_fp8(
            weight.to(device), scales.to(device), dtype=torch.bfloat16, block=(128, 128), backend=backend
        ).cpu()
    for expert in range(shape[0]):
        assert same(got[expert], theirs._create_dequantized_weight(weight[expert], scales[expert]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8], ids=str)
def test_fp8_like_transformers(
    stored: torch.dtype, dtype: torch.dtype, backend: str, device: str, generator: torch.Generator
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    theirs = Fp8Dequantize(None)
    for shape, grid in (((1, 128, 256), (1, 2)), ((2, 40, 96), (1, 3)), ((2, 33, 64), (33, 1)), ((1, 9, 160), (9, 5))):
        weight = fp8(generator, *shape)
        if stored in (torch.uint8, torch.float8_e8m0fnu):
            scales = octets(generator, shape[0], *grid, low=0, high=255).view(stored)
        else:
            scales = fp8_scales(generator, shape[0], *grid).to(stored)
        got = dequantize_fp8(weight.to(device), scales.to(device), dtype=dtype, backend=backend).cpu()
        assert same(got, theirs._dequantize_one(weight, scales, dtype)), (shape, grid)


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fp8_by_tensor_and_channel_like_compressed_tensors(
    strategy: str, dtype: torch.dtype, backend: str, device: str, generator: torch.Generator
) -> None:
    """Their result has the dtype of the scales; so does ours here."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True)
    weight = fp8(generator, 24, 80)
    scales = fp8_scales(generator, *((1,) if strategy == "tensor" else (24, 1))).to(dtype)
    theirs = BaseCompressor.load_from_registry("float-quantized").decompress(
        {"weight": weight, "weight_scale": scales}, QuantizationScheme(targets=["Linear"], weights=args)
    )["weight"]
    got = dequantize_fp8(weight.to(device), scales.to(device), dtype=dtype, backend=backend)
    assert same(got.cpu(), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4_like_gpt_oss(dtype: torch.dtype, backend: str, device: str, generator: torch.Generator) -> None:
    """transformers gives the transpose, and looks values up in the output's dtype: exact, as all are short."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = octets(generator, 2, 40, 3, 16), octets(generator, 2, 40, 3, low=0, high=255)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    got = dequantize_fp4(blocks.to(device), scales.to(device), dtype=dtype, backend=backend)
    assert same(got.cpu(), theirs.mT)


@pytest.mark.parametrize("name", ["mxfp4-pack-quantized", "nvfp4-pack-quantized"])
@pytest.mark.parametrize("shape", [(16, 64), (33, 288)], ids=str)
def test_fp4_like_compressed_tensors(name: str, shape, backend: str, device: str, generator: torch.Generator) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    group = 32 if name.startswith("mx") else 16
    strategy = "group" if name.startswith("mx") else "tensor_group"
    args = QuantizationArgs(num_bits=4, type="float", strategy=strategy, symmetric=True, group_size=group)
    state = {"weight_packed": octets(generator, shape[0], shape[1] // 2)}
    if name.startswith("mx"):
        state["weight_scale"] = octets(generator, shape[0], shape[1] // group, low=0, high=255)
    else:
        state["weight_scale"] = fp8(generator, shape[0], shape[1] // group)
        state["weight_global_scale"] = torch.tensor([1234.567])
    theirs = BaseCompressor.load_from_registry(name).decompress(
        dict(state), QuantizationScheme(targets=["Linear"], weights=args)
    )["weight"]
    level = state.get("weight_global_scale")
    got = dequantize_fp4(
        state["weight_packed"].to(device), state["weight_scale"].to(device), dtype=torch.bfloat16,
        global_scale=None if level is None else level.to(device), backend=backend,
    )  # fmt: skip
    assert same(got.cpu(), theirs)


def test_the_default_dtype_does_not_matter(backend: str, device: str, generator: torch.Generator) -> None:
    """Models are loaded while another one is set."""
    packed, scales = octets(generator, 4, 32).to(device), fp8(generator, 4, 4).to(device)
    want = dequantize_fp4(packed, scales, dtype=torch.float32, backend=backend)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert same(dequantize_fp4(packed, scales, dtype=torch.float32, backend=backend).cpu(), want.cpu())
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_second_level_can_multiply(backend: str, device: str, generator: torch.Generator) -> None:
    packed, scales = octets(generator, 5, 24), fp8(generator, 5, 3)
    level = torch.tensor([0.00321])
    plain = dequantize_fp4(packed, torch.ones(5, 3), dtype=torch.float32, backend="reference")
    want = plain.unflatten(1, (3, 16)) * (scales.float() * level)[..., None]
    got = dequantize_fp4(packed.to(device), scales.to(device), dtype=torch.float32, global_scale=level.to(device),
                         divide=False, backend=backend)  # fmt: skip
    assert same(got.cpu(), want.flatten(1))


def test_views_and_nothing_beside_them(backend: str, device: str, generator: torch.Generator) -> None:
    """Sliced codes and scales, of which only the inside may be read."""
    weight, scales = fp8(generator, 3, 20, 70), fp8_scales(generator, 3, 4, 9)
    part, grid = weight.to(device)[1:, 2:18, 3:67], scales.to(device)[1:, 1:3, 2:6]
    got = dequantize_fp8(part, grid, dtype=torch.float32, backend=backend)
    want = dequantize_fp8(part.cpu().clone(), grid.cpu().clone(), dtype=torch.float32, backend="reference")
    assert got.is_contiguous() and same(got.cpu(), want)


def test_nothing_to_do(backend: str, device: str) -> None:
    for shape in ((0, 4, 8), (2, 0, 8)):
        weight = torch.zeros(shape, dtype=torch.uint8, device=device).view(FP8)
        got = dequantize_fp8(weight, torch.ones(1, device=device), dtype=torch.float16, backend=backend)
        assert got.shape == shape


def test_refuses_what_does_not_fit() -> None:
    weight, scales = torch.zeros(8, 12, dtype=torch.uint8).view(FP8), torch.ones(2, 3)
    bf16 = torch.bfloat16
    for call, words in (
        (lambda: dequantize_fp8(weight.float(), scales, dtype=bf16), "weight is torch.float32"),
        (lambda: dequantize_fp8(weight, scales.long(), dtype=bf16), "scales is torch.int64"),
        (lambda: dequantize_fp8(weight, torch.ones(3, 3), dtype=bf16), "scales has 3 x 3 blocks"),
        (lambda: dequantize_fp8(weight, scales, dtype=bf16, block=(8, 4)), "block ="),
        (lambda: dequantize_fp8(weight, scales, dtype=torch.int8), "dtype ="),
        (lambda: dequantize_fp8(weight, scales.to("meta"), dtype=bf16), "scales is on meta"),
        (lambda: dequantize_fp8(weight, torch.ones(2, 2, 3), dtype=bf16), "scales is"),
        (lambda: dequantize_fp4(weight.float(), scales, dtype=bf16), "packed is torch.float32"),
        (lambda: dequantize_fp4(weight.view(torch.uint8), torch.ones(8, 5), dtype=bf16), "scales has 5 groups"),
        (lambda: dequantize_fp4(weight.view(torch.uint8), torch.ones(4, 3), dtype=bf16), "scales is"),
        (
            lambda: dequantize_fp4(weight.view(torch.uint8), torch.ones(8, 3), dtype=bf16, global_scale=scales),
            "global_scale is",
        ),
    ):
        with pytest.raises(ArgumentError, match=words):
            call()


def test_opcheck(backend: str, device: str, generator: torch.Generator) -> None:
    codes, scales = octets(generator, 2, 6, 8).to(device), octets(generator, 2, 6, 1).to(device)
    torch.library.opcheck(_dequantize, (codes, scales % 200, None, 1, 16, torch.float32, True, "e8m0", True, backend))

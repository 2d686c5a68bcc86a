"""Every implementation of `fit_grid` and `round_to_grid` against the reference, and codes that come out packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sarqc_kernels import fit_grid, pack, quantize_columns, round_to_grid
from sarqc_kernels.testing import dequantize, poisoned_empty, random_gram, random_quantized, upper_factor

CASES = [  # experts, rows, columns, group_size, bits, sym, search, weighted, dtype
    (1, 5, 48, 16, 4, True, False, False, torch.bfloat16),
    (2, 33, 20, 10, 3, False, False, True, torch.float32),
    (1, 3, 20, 20, 4, True, True, True, torch.float16),
    (1, 7, 14, 7, 2, False, True, False, torch.float32),
    (1, 40, 9, 1, 8, False, False, False, torch.float16),
]


def options(bits: int, group_size: int, sym: bool, search: bool, dtype: torch.dtype) -> dict[str, Any]:
    return {"bits": bits, "group_size": group_size, "sym": sym, "search": search, "scale_dtype": dtype}


def fitted(backend: str, device: str, weight: Tensor, importance: Tensor | None, rule: dict[str, Any]) -> list[Tensor]:
    with poisoned_empty():
        importance = None if importance is None else importance.to(device)
        return [part.cpu() for part in fit_grid(weight.to(device), importance, **rule, backend=backend)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grids_are_those_of_the_reference(case, backend, device, generator):
    """Min-max to the bit; a search may take the neighbour of a trial whose loss is equal but for the last bits."""
    experts, rows, columns, group_size, bits, sym, search, weighted, dtype = case
    weight = torch.randn(experts, rows, columns, generator=generator) + 0.3
    importance = torch.rand(experts, columns, generator=generator) if weighted else None
    rule = options(bits, group_size, sym, search, dtype)
    want = fit_grid(weight, importance, **rule, backend="reference")
    got = fitted(backend, device, weight, importance, rule)
    for ours, theirs in zip(got, want):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        differing = int((ours != theirs).sum())
        assert differing <= (max(1, ours.numel() // 50) if search else 0)


@pytest.mark.parametrize("sym", [True, False])
def test_hard_groups_stay_finite(sym, backend, device):
    rows = torch.tensor([0.0, 0.25, -0.25, 1e-12, 1e-42, 3e38, -1e7])
    weight = rows.view(1, -1, 1).repeat(1, 1, 16)
    rule = options(4, 16, sym, False, torch.float16)
    scales, zeros = fitted(backend, device, weight, None, rule)
    assert scales.isfinite().all() and (scales.float() >= torch.finfo(torch.float16).tiny).all()
    want = fit_grid(weight, None, **rule, backend="reference")
    assert torch.equal(scales, want[0]) and torch.equal(zeros, want[1])


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_are_those_of_the_reference(bits, dtype, backend, device, generator):
    """Weights on the grid, half-way between two codes, beyond it, infinite; a scale of zero; between guard columns."""
    quantized = random_quantized(generator, (2, 9, 30), 3, bits, sym=False, scale_dtype=dtype)
    scales = quantized.scales.clone()
    scales[0, 0, 0] = 0
    weight = dequantize(quantized)
    weight[:, 1] += 0.5 * scales[:, 1].float().repeat_interleave(10, -1)
    weight[:, 2] = torch.randn(2, 30, generator=generator) * 3
    weight[0, 3, :4] = torch.tensor([float("inf"), float("-inf"), 1e30, -1e30])
    want = round_to_grid(weight, scales, quantized.zeros, bits=bits, backend="reference")
    guarded = torch.full((2, 9, 40), float("nan"), device=device)
    guarded[..., 4:34] = weight.to(device)
    with poisoned_empty():
        codes = round_to_grid(guarded[..., 4:34], scales.to(device), quantized.zeros.to(device), bits=bits,
                              backend=backend)  # fmt: skip
    assert torch.equal(codes.cpu(), want)
    kept = torch.ones(2, 9, dtype=torch.bool)
    kept[:, 1:4] = False
    kept[0, 0] = False
    assert torch.equal(want[kept], quantized.codes[kept])


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
def test_nothing_to_do(shape, backend, device):
    scales, zeros = fitted(backend, device, torch.zeros(shape), None, options(4, 4, True, True, torch.float16))
    assert scales.shape == zeros.shape == (*shape[:2], 2)
    codes = round_to_grid(torch.zeros(shape, device=device), scales.to(device), zeros.to(device), bits=4,
                          backend=backend)  # fmt: skip
    assert codes.shape == shape


def test_opcheck(backend, device, generator):
    weight = torch.randn(1, 3, 8, generator=generator).to(device)
    importance = torch.ones(1, 8, device=device)
    arguments = (weight, importance, 4, 4, True, False, torch.float16, backend)
    torch.library.opcheck(torch.ops.sarqc.fit_grid.default, arguments)
    scales, zeros = fit_grid(weight, None, **options(4, 4, True, False, torch.float16), backend=backend)
    torch.library.opcheck(torch.ops.sarqc.round_to_grid.default, (weight, scales, zeros, 4, backend))


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_come_out_packed_if_asked(bits, backend, device, generator):
    weight = torch.randn(2, 5, 24, generator=generator).to(device)
    factor = upper_factor(random_gram(generator, 2, 24)).float().to(device)
    rule = options(bits, 12, True, False, torch.bfloat16)
    plain = quantize_columns(weight, factor, None, None, None, **rule, backend=backend)
    words, *grid = quantize_columns(weight, factor, None, None, None, **rule, packed=True, backend=backend)
    assert torch.equal(words, pack(plain[0], bits)) and words.dtype == torch.int32
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(grid, plain[1:]))

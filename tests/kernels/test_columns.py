"""Column quantization: exact probes, then an independent textbook GPTQ in float64, then independence and poison."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sarqc_kernels import ArgumentError, fit_grid, quantize_columns, round_to_grid
from sarqc_kernels.columns import reference
from sarqc_kernels.testing import Quantized, dequantize, poisoned_empty, random_gram, upper_factor


def options(bits: int, group_size: int, sym: bool, search: bool, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    return {"bits": bits, "group_size": group_size, "sym": sym, "search": search, "scale_dtype": dtype}


def group_order(generator: torch.Generator, experts: int, columns: int, group_size: int) -> Tensor:
    """Groups shuffled, and columns shuffled inside each group."""
    rows = []
    for _ in range(experts):
        groups = torch.randperm(columns // group_size, generator=generator) * group_size
        rows.append(torch.cat([g + torch.randperm(group_size, generator=generator) for g in groups]))
    return torch.stack(rows)


def permuted(hessian: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return hessian
    return torch.stack([h[o][:, o] for h, o in zip(hessian, order)])


def textbook(weight: Tensor, hessian: Tensor, given: Quantized | None, rule: dict[str, Any]) -> Quantized:
    """GPTQ as published, for one expert with columns in place: weight [N, K], hessian [K, K], all in fp64.

    The inverse of H, its upper Cholesky factor U, and every error e = (w - q) / U_jj taken out of all later columns at
    once. Groups are fitted when reached, on the compensated weights.
    """
    size, top = rule["group_size"], 2 ** rule["bits"] - 1
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    work = weight.double().clone()
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    grids = []
    for j in range(weight.shape[1]):
        if j % size == 0:
            if given is None:
                importance = upper.diagonal()[j : j + size].pow(-2).float()
                scales, zeros = fit_grid(work[None, :, j : j + size].float(), importance[None], **rule)
            else:
                scales, zeros = (part[..., j // size, None] for part in given[1:])
            grids.append((scales[0, :, 0], zeros[0, :, 0]))
        scale, zero = grids[-1][0].double(), grids[-1][1].double()
        code = ((work[:, j] / scale).round() + zero).clamp(0, top)
        codes[:, j] = code.to(torch.uint8)
        error = (work[:, j] - (code - zero) * scale) / upper[j, j]
        work[:, j:] -= error[:, None] * upper[j, j:]
    scales, zeros = (torch.stack(part, 1)[None] for part in zip(*grids))
    return Quantized(codes[None], scales, zeros)


def objective(weight: Tensor, hessian: Tensor, quantized: Quantized) -> float:
    error = weight.double() - dequantize(quantized).double()
    return float((error @ hessian.double() * error).sum())


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 48), (3, 33, 200), (2, 5, 260)], ids=str)
def test_identity_factor_is_plain_rounding(shape: tuple[int, int, int], generator: torch.Generator) -> None:
    experts, _, columns = shape
    weight = torch.randn(shape, generator=generator)
    size = columns if columns % 20 else 20
    rule = options(3, size, False, True)
    scales, zeros = fit_grid(weight, None, **rule)
    factor = torch.eye(columns).expand(experts, -1, -1)
    shuffled = torch.stack([torch.randperm(columns, generator=generator) for _ in range(experts)])
    want = round_to_grid(weight, scales, zeros, bits=3)
    for order in (None, shuffled):
        with poisoned_empty():
            got = quantize_columns(weight, factor, order, scales, zeros, **rule)
        assert torch.equal(got[0], want) and torch.equal(got[1], scales) and torch.equal(got[2], zeros)
    # fitted on the way, an identity changes nothing either: the compensated groups are the groups
    got = quantize_columns(weight, factor, group_order(generator, experts, columns, size), None, None, **rule)
    fitted = fit_grid(weight, torch.ones(experts, columns), **rule)
    assert torch.equal(got[1], fitted[0]) and torch.equal(got[2], fitted[1])


def test_two_columns_by_hand() -> None:
    """w = (0.4, 0.3), scale 1, M_01 / M_11 = 0.75: the first rounds to 0, so the second sees 0.3 + 0.4 * 0.75 = 0.6."""
    weight = torch.tensor([[[0.4, 0.3]]])
    factor = torch.tensor([[[2.0, 3.0], [float("nan"), 4.0]]])  # below the diagonal nothing is read
    grid = torch.ones(1, 1, 1), torch.full((1, 1, 1), 8, dtype=torch.uint8)
    codes, *_ = quantize_columns(weight, factor, None, *grid, **options(4, 2, True, False))
    assert codes.flatten().tolist() == [8, 9]


@pytest.mark.parametrize(
    ("columns", "size"),
    [(96, 96), (97, 97), (192, 32), (192, 64), (200, 40), (270, 135), (288, 144), (240, 24), (330, 330), (45, 1)],
    ids=str,
)
@pytest.mark.parametrize("sym", [True, False])
def test_against_the_textbook(columns: int, size: int, sym: bool, generator: torch.Generator) -> None:
    """Sizes: one group (even and odd K), groups inside a panel, groups over several panels, one column a group."""
    weight = torch.randn(1, 40, columns, generator=generator) * 0.02
    hessian = random_gram(generator, 1, columns)
    for fixed in (False, True):
        rule = options(4, size, sym, not fixed)
        order = None if sym else group_order(generator, 1, columns, size)
        inner = permuted(hessian, order)
        factor = upper_factor(inner).float()
        lined_up = weight if order is None else weight[:, :, order[0]]
        grid = Quantized(torch.empty(0), *fit_grid(weight, None, **rule)) if fixed else None
        in_order = grid
        if order is not None and grid is not None:
            groups = order[0, ::size] // size
            in_order = Quantized(grid[0], grid[1][..., groups], grid[2][..., groups])
        with poisoned_empty():
            got = quantize_columns(weight, factor, order, *(grid[1:] if grid else (None, None)), **rule)
        want = textbook(lined_up[0], inner[0], in_order, rule)
        codes = got[0] if order is None else got[0][:, :, order[0]]
        assert float((codes == want.codes).float().mean()) >= 0.999
        ours = objective(weight, hessian, Quantized(*got))
        theirs = objective(lined_up, inner, want)
        assert ours == pytest.approx(theirs, rel=1e-3)
        plain = fit_grid(weight, hessian.diagonal(dim1=1, dim2=2).float(), **rule)
        rounded = Quantized(round_to_grid(weight, *plain, bits=4), *plain)
        if size > 1:
            assert ours < objective(weight, hessian, rounded)


def test_given_grids_take_any_order(generator: torch.Generator) -> None:
    """An order that jumps between groups, against the same problem with the columns laid out in that order."""
    weight = torch.randn(2, 9, 64, generator=generator)
    hessian = random_gram(generator, 2, 64)
    order = torch.stack([torch.randperm(64, generator=generator) for _ in range(2)])
    factor = upper_factor(permuted(hessian, order)).float()
    rule = options(3, 16, False, False)
    scales, zeros = fit_grid(weight, None, **rule)
    codes, *_ = quantize_columns(weight, factor, order, scales, zeros, **rule)
    index = order.unsqueeze(1).expand(-1, 9, -1)
    wide = scales.repeat_interleave(16, 2).gather(2, index), zeros.repeat_interleave(16, 2).gather(2, index)
    lined, *_ = quantize_columns(weight.gather(2, index), factor, None, *wide, **options(3, 1, False, False))
    assert torch.equal(codes.gather(2, index), lined)


def test_given_scales_are_rounded_before_weights_are(generator: torch.Generator) -> None:
    weight = torch.randn(1, 5, 32, generator=generator)
    scales = torch.rand(1, 5, 2, generator=generator) + 0.1
    factor = upper_factor(random_gram(generator, 1, 32)).float()
    rule = options(4, 16, True, False, torch.bfloat16)
    codes, stored, zeros = quantize_columns(weight, factor, None, scales, None, **rule)
    assert stored.dtype == torch.bfloat16 and torch.equal(stored, scales.bfloat16()) and (zeros == 8).all()
    again = quantize_columns(weight, factor, None, stored, zeros, **rule)
    assert torch.equal(codes, again[0])


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("rows", [(1, 2, 3), (15, 16, 17), (64, 100, 31)], ids=str)
def test_concatenated_rows_get_the_same_codes(rows: tuple[int, ...], search: bool, generator: torch.Generator) -> None:
    """Whole panels, and sizes that leave panels and micro-panels of one column, where BLAS would change its order."""
    for columns, size in ((288, 48), (129, 129)):
        parts = [torch.randn(1, n, columns, generator=generator) * 0.02 for n in rows]
        factor = upper_factor(random_gram(generator, 1, columns)).float()
        rule = options(4, size, True, search)
        whole = quantize_columns(torch.cat(parts, 1), factor, None, None, None, **rule)
        for at, part in enumerate(parts):
            alone = quantize_columns(part, factor, None, None, None, **rule)
            assert all(torch.equal(a, w.split(rows, 1)[at]) for a, w in zip(alone, whole))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("batch", [1, 40, 8192])
def test_batched_experts_get_the_same_codes(
    batch: int, given: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """All at once, several, or one row at a time: the work batch does not show in the result."""
    weight = torch.randn(5, 18, 160, generator=generator) * 0.02
    hessian = random_gram(generator, 5, 160)
    order = group_order(generator, 5, 160, 32)
    factor = upper_factor(permuted(hessian, order)).float()
    rule = options(3, 32, False, True)
    grid = fit_grid(weight, None, **rule) if given else (None, None)
    monkeypatch.setattr(reference, "BATCH", batch)
    with poisoned_empty():
        whole = quantize_columns(weight, factor, order, *grid, **rule)
    monkeypatch.undo()
    for e in range(5):
        one = slice(e, e + 1)
        part = (grid[0][one], grid[1][one]) if grid[0] is not None and grid[1] is not None else (None, None)
        alone = quantize_columns(weight[one], factor[one], order[one], *part, **rule)
        assert all(torch.equal(a, w[one]) for a, w in zip(alone, whole))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("given", [True, False])
def test_an_expert_without_a_factor_is_rounded_alone(bad: float, given: bool, generator: torch.Generator) -> None:
    weight = torch.randn(3, 6, 64, generator=generator)
    factor = upper_factor(random_gram(generator, 3, 64)).float()
    rule = options(4, 16, True, True)
    grid = fit_grid(weight, None, **rule) if given else (None, None)
    good = quantize_columns(weight, factor, None, *grid, **rule)
    broken = factor.clone()
    broken[1, 5:, 5:] = bad
    got = quantize_columns(weight, broken, None, *grid, **rule)
    for e in (0, 2):
        assert all(torch.equal(a[e], b[e]) for a, b in zip(got, good))
    scales, zeros = fit_grid(weight, None, **rule)
    assert torch.equal(got[0][1], round_to_grid(weight, scales, zeros, bits=4)[1])
    assert torch.equal(got[1][1], scales[1])


def test_refuses_what_does_not_fit() -> None:
    weight, factor = torch.zeros(2, 3, 12), torch.eye(12).expand(2, -1, -1)
    order = torch.arange(12).expand(2, -1)
    scales, zeros = torch.ones(2, 3, 3), torch.ones(2, 3, 3, dtype=torch.uint8)
    rule = options(4, 4, True, False)
    jumping = order.view(2, 3, 4).mT.flatten(1)
    for args, words in (
        ((weight.double(), factor, None, None, None), "weight is torch.float64"),
        ((weight, factor[:1], None, None, None), "factor is"),
        ((weight, factor.half(), None, None, None), "factor is torch.float16"),
        ((weight, factor, order.int(), None, None), "order is torch.int32"),
        ((weight, factor, order[:, :11], None, None), "order is"),
        ((weight, factor, order * 0, None, None), "pass permutations"),
        ((weight, factor, order * 0, scales, zeros), "pass permutations"),
        ((weight, factor, jumping, None, None), "keep each group's columns together"),
        ((weight, factor, None, None, zeros), "zeros is given without scales"),
        ((weight, factor, None, scales[..., :1], None), "scales has 1 groups"),
        ((weight, factor, None, scales, zeros.int()), "zeros is torch.int32"),
        ((weight, factor.to("meta"), None, None, None), "factor is on meta"),
    ):
        with pytest.raises(ArgumentError, match=words):
            quantize_columns(*args, **rule)
    quantize_columns(weight, factor, jumping, scales, zeros, **rule)


def test_opcheck(generator: torch.Generator) -> None:
    weight = torch.randn(2, 3, 12, generator=generator)
    factor = upper_factor(random_gram(generator, 2, 12)).float()
    order = group_order(generator, 2, 12, 4)
    op = torch.ops.sarqc.quantize_columns.default
    torch.library.opcheck(op, (weight, factor, order, None, None, 4, 4, True, True, torch.float16))
    scales, zeros = fit_grid(weight, None, **options(4, 4, False, False))
    torch.library.opcheck(op, (weight, factor, None, scales, zeros, 4, 4, False, False, torch.float16))

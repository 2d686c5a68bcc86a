"""Coordinate descent: every implementation against the reference and fp64, and the C++ one to the bit.

That the reference is coordinate descent, and that no row becomes worse, is held in `tests/method`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sarqc_kernels import ArgumentError, coordinate_descent, quantize_columns
from sarqc_kernels.columns import cpu_impl, descent
from sarqc_kernels.testing import Quantized, dequantize, poisoned_empty, random_gram, upper_factor

BACKENDS = ("reference", "cpu", "triton")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning:triton")

CASES = [  # experts, rows, columns, group, bits, sym, dtype
    (1, 5, 32, 16, 4, True, torch.float16),
    (2, 33, 20, 10, 3, False, torch.bfloat16),
    (1, 70, 64, 32, 2, True, torch.float32),
    (1, 9, 6, 1, 3, False, torch.float16),
    (1, 3, 160, 160, 8, False, torch.float32),
]


def unsupported_reason(backend: str) -> str | None:
    return cpu_impl.unsupported_reason() if backend == "cpu" else None


def problem(case, generator: torch.Generator) -> tuple[Tensor, Quantized, Tensor]:
    """A weight, what the greedy pass makes of it, and the fp32 Hessian."""
    experts, rows, columns, group, bits, sym, dtype = case
    weight = torch.randn(experts, rows, columns, generator=generator) * 0.02
    hessian = random_gram(generator, experts, columns, spread=5.0)
    factor = upper_factor(hessian).float()
    result = quantize_columns(weight, factor, None, None, None, bits=bits, group_size=group, sym=sym, search=True,
                             scale_dtype=dtype, backend="reference")  # fmt: skip
    hessian = hessian.float()
    return weight, Quantized(*result), (hessian + hessian.mT) / 2


def losses(weight: Tensor, quantized: Quantized, hessian: Tensor) -> Tensor:
    """e H e^T of each row in fp64, [E, N]."""
    error = weight.double() - dequantize(quantized).double()
    return ((error @ hessian.double()) * error).sum(-1)


def descended(case, backend: str, device: str, weight: Tensor, start: Quantized, hessian: Tensor, passes: int = 2):
    args = [tensor.to(device) for tensor in (weight, *start, hessian)]
    with poisoned_empty():
        codes, scales = coordinate_descent(*args, bits=case[4], passes=passes, backend=backend)
    return Quantized(codes.cpu(), scales.cpu(), start.zeros)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_like_the_reference_and_never_worse(case, backend: str, device: str, generator: torch.Generator) -> None:
    weight, start, hessian = problem(case, generator)
    kept = [part.clone() for part in start]
    got = descended(case, backend, device, weight, start, hessian)
    want = descended(case, "reference", "cpu", weight, start, hessian)
    assert all(torch.equal(part, before) for part, before in zip(start, kept))
    assert got.scales.dtype == case[6]
    before, after = losses(weight, start, hessian), losses(weight, got, hessian)
    assert (after <= before * (1 + 1e-5)).all() and float(after.sum()) < float(before.sum())
    if backend == "cpu":
        assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)
    assert float((got.codes == want.codes).float().mean()) >= 0.999
    assert float(after.sum()) == pytest.approx(float(losses(weight, want, hessian).sum()), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scales_at_the_ends_of_their_dtype(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Subnormal scales and those near the largest are rounded as torch rounds them."""
    if reason := cpu_impl.unsupported_reason():
        pytest.skip(reason)
    _, start, hessian = problem((1, 64, 32, 8, 3, True, dtype), generator)
    limits = torch.finfo(dtype)
    for scale in (limits.tiny * 0.9, limits.tiny * 1.3, limits.max * 0.6, limits.max * 0.99):
        scales = (start.scales.sign() * scale * (1 + 0.1 * torch.rand(start.scales.shape, generator=generator))).to(
            dtype
        )
        scales = scales.clamp(-limits.max, limits.max)
        level = start.codes.float() - 4
        blurred = (
            level * scales.float().repeat_interleave(8, -1) * (0.7 + 0.6 * torch.rand(1, 64, 1, generator=generator))
        )
        args = (blurred, start.codes, scales, start.zeros, hessian * 1e-3)
        ours, theirs = (coordinate_descent(*args, bits=3, passes=2, backend=name) for name in ("cpu", "reference"))
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert ours[1].isfinite().all()


def test_an_expert_without_a_hessian_keeps_what_it_has(backend: str, device: str, generator: torch.Generator) -> None:
    case = (3, 6, 12, 6, 3, True, torch.float32)
    weight, start, hessian = problem(case, generator)
    alone = descended(case, backend, device, weight, start, hessian)
    for spoiled in (0.0, float("nan"), float("inf")):
        hessian[1] = spoiled
        got = descended(case, backend, device, weight, start, hessian)
        assert torch.equal(got.codes[1], start.codes[1]) and torch.equal(got.scales[1], start.scales[1])
        assert torch.equal(got.codes[[0, 2]], alone.codes[[0, 2]])
        assert torch.equal(got.scales[[0, 2]], alone.scales[[0, 2]])


def test_rows_and_threads_do_not_see_each_other(backend: str, device: str, generator: torch.Generator) -> None:
    case = (2, 100, 16, 16, 3, False, torch.float16)
    weight, start, hessian = problem(case, generator)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    whole = descended(case, backend, device, weight, start, hessian)
    torch.set_num_threads(before)
    for expert, rows in ((0, slice(3, 4)), (1, slice(60, 100))):
        part = Quantized(*(each[expert, None, rows].contiguous() for each in start))
        alone = descended(case, backend, device, weight[expert, None, rows], part, hessian[expert, None])
        assert torch.equal(alone.codes[0], whole.codes[expert, rows])
        assert torch.equal(alone.scales[0], whole.scales[expert, rows])


def test_no_pass_is_a_copy(backend: str, device: str, generator: torch.Generator) -> None:
    case = CASES[0]
    weight, start, hessian = problem(case, generator)
    got = descended(case, backend, device, weight, start, hessian, passes=0)
    assert torch.equal(got.codes, start.codes) and got.codes.data_ptr() != start.codes.data_ptr()


def test_refuses_what_does_not_fit(generator: torch.Generator) -> None:
    weight, start, hessian = problem(CASES[0], generator)
    good = (weight, *start, hessian)
    for at, bad, words in (
        (0, weight.half(), "weight is"),
        (1, start.codes.int(), "codes is"),
        (2, start.scales.double(), "scales is"),
        (2, start.scales.repeat(1, 1, 3)[..., :3], "scales is"),
        (3, start.zeros[:, :2], "zeros is"),
        (4, hessian[:, :5], "hessian is"),
        (4, hessian.to("meta"), "hessian is on meta"),
    ):
        with pytest.raises(ArgumentError, match=words):
            coordinate_descent(*good[:at], bad, *good[at + 1 :], bits=4, passes=1)
    with pytest.raises(ArgumentError, match="passes = -1"):
        coordinate_descent(*good, bits=4, passes=-1)
    with pytest.raises(ArgumentError, match="bits = 9"):
        coordinate_descent(*good, bits=9, passes=1)


def test_opcheck(backend: str, device: str, generator: torch.Generator) -> None:
    weight, start, hessian = problem((1, 3, 8, 8, 4, True, torch.float16), generator)
    args = [tensor.to(device) for tensor in (weight, *start, hessian)]
    torch.library.opcheck(descent._coordinate_descent, (*args, 4, 1, backend))

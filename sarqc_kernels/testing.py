"""Material for testing kernels: inputs with a known answer, bounds with a reason, memory that bites.

Nothing here is used by the operations. Random inputs come from a generator that the test passes, so that a failure
repeats; every bound is derived, not tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Quantized",
    "dequantize",
    "poisoned_empty",
    "product_bound",
    "random_gram",
    "random_quantized",
    "relative_error",
    "uneven_offsets",
    "upper_factor",
]


class Quantized(NamedTuple):
    """Codes uint8 [E, N, K] with their grid: scales floating [E, N, G], zeros uint8 [E, N, G]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def relative_error(result: Tensor, exact: Tensor) -> float:
    """||result - exact|| / ||exact|| over all elements, in fp64; 0 where both vanish."""
    difference = (result.double() - exact.double()).norm()
    return float(difference / exact.double().norm()) if difference else 0.0


def product_bound(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Largest error, element by element, of a @ b summed in `dtype` in any order: n * eps * |a| @ |b|.

    n counts the terms of a sum; every product and every addition rounds once, each by at most eps / 2 (Higham's
    gamma_n; eps instead of eps / 2 covers its denominator). A sum in another order has the same bound.
    """
    eps = torch.finfo(dtype).eps
    return (a.double().abs() @ b.double().abs()) * (a.shape[-1] * eps)


def random_quantized(
    generator: torch.Generator,
    shape: tuple[int, int, int],
    groups: int,
    bits: int,
    *,
    sym: bool = True,
    scale_dtype: torch.dtype = torch.float16,
) -> Quantized:
    """A quantized weight [E, N, K]: all codes as likely, scales of 0.01 to 0.02, half of them negative."""
    experts, rows, _ = shape
    codes = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    drawn = 2 * torch.rand((experts, rows, groups), generator=generator) - 1
    scales = (0.01 * (drawn + drawn.sign())).to(scale_dtype)
    zeros = torch.full((experts, rows, groups), 1 << (bits - 1), dtype=torch.uint8)
    if not sym:
        zeros = torch.randint(0, 1 << bits, (experts, rows, groups), generator=generator, dtype=torch.uint8)
    return Quantized(codes, scales, zeros)


def dequantize(weight: Quantized) -> Tensor:
    """(code - zero) * scale in fp32 [E, N, K]: what the codes stand for."""
    groups = weight.codes.unflatten(-1, (weight.scales.shape[-1], -1)).float()
    values: Tensor = (groups - weight.zeros.float().unsqueeze(-1)) * weight.scales.float().unsqueeze(-1)
    return values.flatten(-2)


def random_gram(
    generator: torch.Generator, experts: int, inputs: int, spread: float = 30.0, device: str = "cpu"
) -> Tensor:
    """Symmetric positive definite fp64 [E, K, K] as activations make them: correlated, a few inputs far larger.

    spread: ratio of the largest to the smallest input magnitude. device: where products of thousands of inputs are
    made, which take a core half a minute; the result lies there.
    """
    mixed = torch.randn((experts, 2 * inputs, inputs), generator=generator, dtype=torch.float64)
    mixed = mixed + 0.7 * mixed.roll(1, -1) + mixed[..., :1]
    size = spread ** torch.rand((experts, 1, inputs), generator=generator, dtype=torch.float64)
    x = (mixed * size).to(device)
    gram = x.mT @ x / x.shape[1]
    ridge = 0.01 * gram.diagonal(dim1=1, dim2=2).mean(1)
    return gram + ridge[:, None, None] * torch.eye(inputs, dtype=torch.float64, device=device)


def upper_factor(hessian: Tensor) -> Tensor:
    """The upper triangular M with hessian = M M^T, [E, K, K], in hessian's dtype: a Cholesky factor seen backwards."""
    lower: Tensor = torch.linalg.cholesky(hessian.flip(-2, -1))
    return lower.flip(-2, -1).contiguous()


def uneven_offsets(generator: torch.Generator, tokens: int, experts: int) -> Tensor:
    """int64 [experts + 1] from 0 to `tokens`: stretches of random length, one of them empty where experts >= 2."""
    cuts = torch.randint(0, tokens + 1, (experts - 1,), generator=generator).sort().values
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])])
    if experts >= 2:
        empty = int(torch.randint(1, experts, (1,), generator=generator))
        offsets[empty] = offsets[empty - 1]
    return offsets


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """While it lasts, memory from torch.empty, torch.empty_like and Tensor.new_empty holds NaN (integers: their top).

    An operation that reads what it did not write then gives a wrong answer every time, not once in a while.
    """

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            if out.dtype.is_floating_point:
                return out.fill_(float("nan"))
            return out if out.dtype == torch.bool else out.fill_(torch.iinfo(out.dtype).max)

        return wrapper

    places: list[tuple[Any, str]] = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    kept = [getattr(place, name) for place, name in places]
    for (place, name), make in zip(places, kept):
        setattr(place, name, poisoned(make))
    try:
        yield
    finally:
        for (place, name), make in zip(places, kept):
            setattr(place, name, make)

"""Column quantization with error feedback: the solver's inner loop, and the grids it rounds to.

Given the factor M (upper triangular, H = M M^T) of what the calibration says about the inputs, the loss of a quantized
weight Q is ||(W - Q) M||^2, summed over rows. Taking the columns in order, with delta_i = w_i - q_i for the columns
already done, the part of that loss which column j decides is M_jj^2 (p_j - q_j)^2 with

    p_j = w_j + (sum over i < j of delta_i M_ij) / M_jj

so the best code of column j is p_j rounded. That is GPTQ (the same codes as its textbook form), with no inverse of H
and each weight written once. Rows are independent; experts are independent; an identity M is plain rounding.

Four operations, each a `torch.library` custom op of the namespace `sarqc` behind a function that checks:

- `fit_grid`: scales and zeros of every group, by min-max or by weighted error search.
- `round_to_grid`: codes of plain rounding on a given grid.
- `quantize_columns`: codes with error feedback, on a given grid or one fitted as the solver reaches each group.
- `coordinate_descent` (`descent.py`): codes and scales of a quantized weight improve each other.

The weight that codes stand for is (code - zero) * scale in fp32, throughout. NaN or Inf in weights is not looked for
(that would wait for the device): the caller checks; here they spoil the codes of their own rows and raise nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sarqc_kernels.backend import Implementation, pick, takes_all
from sarqc_kernels.checks import check_bits, check_grid, check_same_device, check_tensor
from sarqc_kernels.columns import descent, grid, panels, reference
from sarqc_kernels.columns.descent import coordinate_descent
from sarqc_kernels.columns.grid import GridRule, Problem
from sarqc_kernels.device import fastest_first, triton_unsupported
from sarqc_kernels.errors import ArgumentError
from sarqc_kernels.packing import words_of

__all__ = [
    "GridRule",
    "Problem",
    "coordinate_descent",
    "fit_grid",
    "implementations",
    "quantize_columns",
    "round_to_grid",
]

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _triton_unsupported(weight: Tensor, *_: object) -> str | None:
    return triton_unsupported(weight) or panels.too_large(weight.shape[2])


def _triton_unsupported_fit(weight: Tensor, _: Tensor | None, group_size: int, *__: object) -> str | None:
    return _triton_unsupported(weight) or panels.too_many_groups(weight.shape[2], group_size)


def _triton_unsupported_problem(problem: Problem) -> str | None:
    return _triton_unsupported(problem.weight)


def _triton(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    from sarqc_kernels.columns import triton_impl

    return triton_impl.quantize_columns(problem)


def _cuda_unsupported(problem: Problem) -> str | None:
    from sarqc_kernels.columns import cuda_impl

    return cuda_impl.unsupported(problem)


def _cuda(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    from sarqc_kernels.columns import cuda_impl

    return cuda_impl.quantize_columns(problem)


def _cpu_unsupported(weight: Tensor, *_: object) -> str | None:
    from sarqc_kernels.columns import cpu_impl

    return cpu_impl.unsupported(weight)


def _cpu_unsupported_problem(problem: Problem) -> str | None:
    return _cpu_unsupported(problem.weight)


def _cpu(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    from sarqc_kernels.columns import cpu_impl

    return cpu_impl.quantize_columns(problem)


def _cpu_fit(*args: Any) -> tuple[Tensor, Tensor]:
    from sarqc_kernels.columns import cpu_impl

    return cpu_impl.fit_grid(*args)


def _triton_fit(*args: Any) -> tuple[Tensor, Tensor]:
    from sarqc_kernels.columns import fit_impl

    return fit_impl.fit_grid(*args)


def _triton_round(*args: Any) -> Tensor:
    from sarqc_kernels.columns import fit_impl

    return fit_impl.round_to_grid(*args)


_FIT = (
    Implementation("triton", _triton_unsupported_fit, _triton_fit),
    Implementation("cpu", _cpu_unsupported, _cpu_fit),
    Implementation("reference", takes_all, grid.fit_grid),
)
_ROUND = (
    Implementation("triton", _triton_unsupported, _triton_round),
    Implementation("reference", takes_all, grid.round_to_grid),
)
_QUANTIZE = (
    Implementation("cuda", _cuda_unsupported, _cuda),
    Implementation("triton", _triton_unsupported_problem, _triton),
    Implementation("cpu", _cpu_unsupported_problem, _cpu),
    Implementation("reference", takes_all, reference.quantize_columns),
)


def implementations() -> dict[str, Sequence[Implementation]]:
    """What there is of each operation, fastest first on a card; for `backend.explain`."""
    return {"fit_grid": _FIT, "round_to_grid": _ROUND, "quantize_columns": _QUANTIZE, **descent.implementations()}


def fit_grid(
    weight: Tensor,
    importance: Tensor | None,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    search: bool,
    scale_dtype: torch.dtype,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scales and zeros for every group of `group_size` neighbouring inputs in every row.

    Symmetric: zero is 2^(bits-1) and scale absmax / ((2^bits - 1) / 2). Asymmetric: the range is widened to include 0,
    scale is (max - min) / (2^bits - 1), and zero is the whole number nearest -min / scale. Symmetric scales are
    negative where the largest weight of a group is positive: one more of their codes lies on that side.

    Every scale is finite and no smaller than the smallest normal number of its dtype, also for a group of zeros, which
    the grid represents exactly.

    Args:
        weight: fp32 [E, N, K].
        importance: fp32 [E, K], not negative: weight of a squared error in that input, which only the search reads.
            None: all ones.
        bits: 2 to 8.
        group_size: Inputs that share a scale; divides K.
        sym: Whether the grid is symmetric.
        search: Try a fixed list of factors on the min-max span and keep the least sum of importance * error^2. Min-max
            is one of them, so the result is never worse.
        scale_dtype: fp32, bf16 or fp16; scales are rounded to it before any error is measured.
        backend: See `sarqc_kernels.backend`.

    Returns:
        Scales [E, N, K / group_size] in `scale_dtype`, and zeros uint8 of that shape.

    Raises:
        ArgumentError: Other shapes, dtypes or devices.
    """
    _check_weight(weight)
    _check_rule(weight, bits, group_size, scale_dtype)
    if importance is not None:
        check_tensor("importance", importance, (weight.shape[0], weight.shape[2]), torch.float32)
    check_same_device(weight=weight, importance=importance)
    out: tuple[Tensor, Tensor] = _fit_grid(weight, importance, bits, group_size, sym, search, scale_dtype, backend)
    return out


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, backend: str | None = None) -> Tensor:
    """Codes of RTN: weight / scale in fp32, rounded half to even, plus zero, clamped to 0 .. 2^bits - 1.

    Args:
        weight: fp32 [E, N, K].
        scales: Floating [E, N, G], G divides K. Where one is 0, any code stands for 0.
        zeros: uint8 [E, N, G], below 2^bits.
        bits: 2 to 8.
        backend: See `sarqc_kernels.backend`.

    Returns:
        Codes, uint8 [E, N, K].

    Raises:
        ArgumentError: Other shapes, dtypes or devices.
    """
    _check_weight(weight)
    check_bits(bits)
    check_grid((weight.shape[0], weight.shape[1], weight.shape[2]), scales, zeros)
    check_same_device(weight=weight, scales=scales, zeros=zeros)
    out: Tensor = _round_to_grid(weight, scales, zeros, bits, backend)
    return out


def quantize_columns(
    weight: Tensor,
    factor: Tensor,
    order: Tensor | None = None,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    search: bool,
    scale_dtype: torch.dtype,
    packed: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes that compensate the error made so far, column by column (GPTQ).

    Given scales may have any order. Without scales each group gets its grid when the solver reaches it. That grid is
    fitted as `fit_grid` does, to the compensated weights W_g + (Delta_{<g} M_{<g,g}) M_gg^-1 with importance diag(M)^2.

    Args:
        weight: fp32 [E, N, K].
        factor: fp32 [E, K, K], the upper triangular M with H = M M^T; rows and columns of H are in processing order,
            and the lower triangle is not read. An expert whose diagonal is not finite and positive everywhere gets RTN
            (M = I); other experts do not depend on it.
        order: int64 [E, K], the processing order: column order[e, j] of expert e is processed j-th. None: 0 .. K - 1.
            Without `scales` the columns of a group must be consecutive in it.
        scales: Given scales, floating [E, N, K / group_size], or None.
        zeros: Zeros of given scales, uint8 [E, N, K / group_size]; None: 2^(bits-1).
        bits: 2 to 8.
        group_size: Inputs that share a scale; divides K.
        sym: As in `fit_grid`; not used with given scales.
        search: As in `fit_grid`; not used with given scales.
        scale_dtype: As in `fit_grid`.
        packed: Return int32 words [E, N, ceil(K bits / 32)] as `pack` makes them instead of codes. Packing is a pass of
            its own over the codes on their device (one byte a code read, bits / 8 written) and does not wait for it.
        backend: See `sarqc_kernels.backend`.

    Returns:
        Codes uint8 [E, N, K] (or words), scales in `scale_dtype` and zeros uint8 [E, N, K / group_size], in the
        weight's own column order.

    Raises:
        ArgumentError: Other shapes, dtypes or devices. The values of `order` are checked on the CPU only.
    """
    _check_weight(weight)
    _check_rule(weight, bits, group_size, scale_dtype)
    experts, _, columns = weight.shape
    check_tensor("factor", factor, (experts, columns, columns), torch.float32)
    if order is not None:
        check_tensor("order", order, (experts, columns), torch.int64)
    if scales is None and zeros is not None:
        raise ArgumentError("zeros is given without scales: pass both for a given grid, or neither to have one fitted")
    if scales is not None:
        check_grid((weight.shape[0], weight.shape[1], weight.shape[2]), scales, zeros)
        if scales.shape[-1] * group_size != columns:
            raise ArgumentError(
                f"scales has {scales.shape[-1]} groups: {columns} inputs in groups of {group_size} make "
                f"{columns // group_size}"
            )
    check_same_device(weight=weight, factor=factor, order=order, scales=scales, zeros=zeros)
    out: tuple[Tensor, Tensor, Tensor] = _quantize_columns(
        weight, factor, order, scales, zeros, bits, group_size, sym, search, scale_dtype, backend
    )
    return (words_of(out[0], bits), *out[1:]) if packed else out


@torch.library.custom_op("sarqc::fit_grid", mutates_args=())
def _fit_grid(
    weight: Tensor,
    importance: Tensor | None,
    bits: int,
    group_size: int,
    sym: bool,
    search: bool,
    scale_dtype: torch.dtype,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    args = (weight, importance, group_size, GridRule(bits, sym, search, scale_dtype))
    scales, zeros = pick("fit_grid", fastest_first(_FIT, weight), args, backend).run(*args)
    return scales, zeros


@_fit_grid.register_fake
def _(
    weight: Tensor,
    importance: Tensor | None,
    bits: int,
    group_size: int,
    sym: bool,
    search: bool,
    scale_dtype: torch.dtype,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    shape = (weight.shape[0], weight.shape[1], weight.shape[2] // group_size)
    return weight.new_empty(shape, dtype=scale_dtype), weight.new_empty(shape, dtype=torch.uint8)


@torch.library.custom_op("sarqc::round_to_grid", mutates_args=())
def _round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, backend: str | None = None) -> Tensor:
    args = (weight, scales, zeros, bits)
    codes: Tensor = pick("round_to_grid", fastest_first(_ROUND, weight), args, backend).run(*args)
    return codes


@_round_to_grid.register_fake
def _(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, backend: str | None = None) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.uint8)


@torch.library.custom_op("sarqc::quantize_columns", mutates_args=())
def _quantize_columns(
    weight: Tensor,
    factor: Tensor,
    order: Tensor | None,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    sym: bool,
    search: bool,
    scale_dtype: torch.dtype,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if order is not None and order.device.type == "cpu":  # elsewhere, looking would wait for the device
        _check_order(order, 1 if scales is not None else group_size)
    rule = GridRule(bits, sym, search, scale_dtype)
    problem = Problem(weight, factor, order, scales, zeros, group_size, rule)
    runs = pick("quantize_columns", fastest_first(_QUANTIZE, weight), (problem,), backend).run
    codes, scales_out, zeros_out = runs(problem)
    return codes, scales_out, zeros_out


@_quantize_columns.register_fake
def _(
    weight: Tensor,
    factor: Tensor,
    order: Tensor | None,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    sym: bool,
    search: bool,
    scale_dtype: torch.dtype,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (weight.shape[0], weight.shape[1], weight.shape[2] // group_size)
    codes = weight.new_empty(weight.shape, dtype=torch.uint8)
    return codes, weight.new_empty(shape, dtype=scale_dtype), weight.new_empty(shape, dtype=torch.uint8)


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 3 or weight.dtype != torch.float32:
        raise ArgumentError(
            f"weight is {weight.dtype} {list(weight.shape)}: pass torch.float32 [experts, rows, columns], "
            "with one expert for a dense layer"
        )


def _check_rule(weight: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype) -> None:
    check_bits(bits)
    if group_size < 1 or weight.shape[2] % group_size:
        raise ArgumentError(
            f"group_size = {group_size} does not divide {weight.shape[2]} columns: use a divisor, or "
            f"{weight.shape[2]} for one group per row"
        )
    if scale_dtype not in SCALE_DTYPES:
        raise ArgumentError(
            f"scale_dtype = {scale_dtype} is not storable: use one of {', '.join(map(str, SCALE_DTYPES))}"
        )


def _check_order(order: Tensor, group_size: int) -> None:
    every = torch.arange(order.shape[1])
    if not torch.equal(order.sort(1).values, every.expand_as(order)):
        raise ArgumentError(
            f"order does not hold each of 0 .. {order.shape[1] - 1} once for every expert: pass permutations"
        )
    if group_size > 1:
        owner = order.div(group_size, rounding_mode="floor").unflatten(1, (-1, group_size))
        if bool((owner != owner[..., :1]).any()):
            raise ArgumentError(
                f"order takes columns of different groups of {group_size} in turn while grids are fitted on the way: "
                "keep each group's columns together, or pass scales and zeros"
            )

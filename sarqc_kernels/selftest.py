"""A small call of every operation, with its result by definition in float64: what `doctor` holds implementations to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sarqc_kernels import columns, dequant, gram, w4a16
from sarqc_kernels.backend import Implementation
from sarqc_kernels.device import fastest_first
from sarqc_kernels.testing import Quantized, dequantize, random_gram, random_quantized, relative_error, upper_factor
from sarqc_kernels.w4a16 import experts

EXPERTS, ROWS, INPUTS, TOKENS, GROUP, BITS = 2, 64, 128, 40, 32, 4
FEW = 8
"""Tokens of a call that csrc/gemv.cu takes: of experts up to 8 rows each."""
RULE: dict[str, Any] = {"bits": BITS, "sym": True, "search": False, "scale_dtype": torch.bfloat16}
LAYOUTS = {"cuda": "tiles", "triton": "tiles", "cpu": "int4pack", "reference": "stream"}


@dataclass(frozen=True)
class Probe:
    """One operation. implementations: in the order in which they are tried on a device. arguments: of a small call, as
    implementations see them. error: (backend, device) -> how far off its result is. limit: the most it may be, with the
    reason in the function that measures it. case: tells probes of one operation apart."""

    op: str
    implementations: Callable[[torch.device], Sequence[Implementation]]
    arguments: Callable[[torch.device], tuple[Any, ...]]
    error: Callable[[str, torch.device], float]
    limit: float
    case: str = ""


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _rows(tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Activations bf16 [T, K] and offsets; the first expert has few rows."""
    x = torch.randn(tokens, INPUTS, generator=_generator()).bfloat16()
    return x, torch.tensor([0, 7, tokens])


def _sums(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    shape = (EXPERTS, INPUTS)
    zeros = torch.zeros(EXPERTS, dtype=torch.int64, device=device)
    return torch.zeros(*shape, INPUTS, device=device), zeros, torch.zeros(shape, device=device)


def _accumulate_error(backend: str, device: torch.device) -> float:
    """Products of bf16 are exact in fp32 and the sums have 40 terms: some units of the last place, 1e-5 is generous."""
    x, offsets = _rows()
    total, rows, abs_sum = _sums(device)
    gram.gram_accumulate_(total, rows, abs_sum, x.to(device), offsets.to(device), backend=backend)
    exact = torch.stack([part.double().T @ part.double() for part in (x[:7], x[7:])])
    counted = 0.0 if rows.tolist() == [7, TOKENS - 7] else 1.0
    sums = torch.stack([part.double().abs().sum(0) for part in (x[:7], x[7:])])
    return max(counted, relative_error(total.cpu().tril(), exact.tril()), relative_error(abs_sum.cpu(), sums))


def _cross_arguments(device: torch.device) -> tuple[Any, ...]:
    x, _ = _rows()
    residual = torch.randn(TOKENS, ROWS, generator=_generator())
    return torch.zeros(ROWS, INPUTS, device=device), residual.to(device), x.to(device)


def _cross_error(backend: str, device: torch.device) -> float:
    """Of the residual 2^-16 may be lost, of the sums of 40 terms some units of the last place."""
    total, residual, x = _cross_arguments(device)
    gram.cross_gram_accumulate_(total, residual, x, backend=backend)
    return relative_error(total.cpu(), residual.cpu().double().T @ x.cpu().double())


def _cholesky_arguments(device: torch.device) -> tuple[Any, ...]:
    total = random_gram(_generator(), EXPERTS, INPUTS).float()
    return ((total + total.diagonal(dim1=1, dim2=2).mean() * torch.eye(INPUTS)).to(device),)


def _cholesky_error(backend: str, device: torch.device) -> float:
    """The factor's product is the matrix, up to some units of the last place; its diagonal is above zero."""
    (total,) = _cholesky_arguments(device)
    upper = gram.cholesky_upper(total, backend=backend)[0].cpu().double()
    signed = 0.0 if (upper.diagonal(dim1=1, dim2=2) > 0).all() else 1.0
    return max(signed, relative_error(upper @ upper.mT, total.cpu().double()))


def _finalize_arguments(device: torch.device) -> tuple[Any, ...]:
    total = random_gram(_generator(), EXPERTS, INPUTS).float().to(device)
    rows = torch.tensor([3, 5], device=device)
    saliency = torch.linspace(0.1, 1.0, INPUTS).expand(EXPERTS, -1).contiguous().to(device)
    return total, rows, saliency, torch.tensor([0.5, 0.1], device=device), 0.01


def _finalize_error(backend: str, device: torch.device) -> float:
    """A division and two additions an element, each rounded once."""
    total, rows, saliency, reg_lambda, damp = _finalize_arguments(device)
    finalized = gram.gram_finalize(total, rows, saliency, reg_lambda, damp, backend=backend)
    exact = total.double() / rows[:, None, None]
    diagonal = exact.diagonal(dim1=1, dim2=2)
    diagonal += reg_lambda.double()[:, None] * saliency + damp * diagonal.mean(1, keepdim=True)
    return relative_error(finalized.cpu(), exact.cpu())


def _weight(device: torch.device) -> Tensor:
    return (0.02 * torch.randn(EXPERTS, ROWS, INPUTS, generator=_generator())).to(device)


def _fit_error(backend: str, device: torch.device) -> float:
    """A maximum and a product, then bf16: the reference's grid to the last bit of bf16, which is 2^-8 of a scale."""
    weight = _weight(device)
    scales, _ = columns.fit_grid(weight, None, group_size=GROUP, **RULE, backend=backend)
    largest = weight.double().unflatten(-1, (-1, GROUP)).abs().amax(-1)
    return relative_error(scales.cpu(), (largest * 2 / ((1 << BITS) - 1)).cpu())


def _round_error(backend: str, device: torch.device) -> float:
    """Share of weights that are further from what their code stands for than half a step: none may be."""
    quantized = random_quantized(_generator(), (EXPERTS, ROWS, INPUTS), INPUTS // GROUP, BITS)
    scales, zeros = quantized.scales.to(device), quantized.zeros.to(device)
    weight = dequantize(quantized).to(device)
    codes = columns.round_to_grid(weight, scales, zeros, bits=BITS, backend=backend)
    return float((codes.cpu() != quantized.codes).double().mean())


def _columns_arguments(device: torch.device) -> tuple[Any, ...]:
    factor = upper_factor(random_gram(_generator(), EXPERTS, INPUTS)).float().to(device)
    return (columns.Problem(_weight(device), factor, None, None, None, GROUP, columns.GridRule(**RULE)),)


def _columns_error(backend: str, device: torch.device) -> float:
    """Share of codes that differ from the recurrence in float64 on the same grid: at most one in a thousand."""
    weight, factor, *_ = _columns_arguments(device)[0]
    codes, scales, _ = columns.quantize_columns(
        weight, factor, None, None, None, group_size=GROUP, **RULE, backend=backend
    )
    scale = scales.cpu().double().repeat_interleave(GROUP, -1)
    w, m = weight.cpu().double(), factor.cpu().double()
    delta, exact = torch.zeros_like(w), torch.zeros_like(w)
    for j in range(INPUTS):
        pull = (delta[..., :j] @ m[:, :j, j, None]).squeeze(-1) / m[:, None, j, j]
        level = ((w[..., j] + pull) / scale[..., j]).round().clamp(-8, 7)
        delta[..., j] = w[..., j] - level * scale[..., j]
        exact[..., j] = level + 8
    return float((codes.cpu() != exact).double().mean())


def _descent_arguments(device: torch.device) -> tuple[Any, ...]:
    weight = _weight(device)
    scales, zeros = columns.fit_grid(weight, None, group_size=GROUP, **RULE)
    codes = columns.round_to_grid(weight, scales, zeros, bits=BITS)
    return weight, codes, scales, zeros, random_gram(_generator(), EXPERTS, INPUTS).float().to(device), BITS, 1


def _descent_error(backend: str, device: torch.device) -> float:
    """By how much rows became worse, relative to what they were: nothing but rounding, and 1 where none improved."""
    weight, codes, scales, zeros, hessian, *_ = _descent_arguments(device)
    result = columns.coordinate_descent(weight, codes, scales, zeros, hessian, bits=BITS, passes=1, backend=backend)

    def losses(codes: Tensor, scales: Tensor) -> Tensor:
        error = (weight - dequantize(Quantized(codes, scales, zeros))).double()
        result: Tensor = ((error @ hessian.double()) * error).sum(-1)
        return result

    before, after = losses(codes, scales), losses(*result)
    return float((after / before - 1).clamp(min=0).max()) if bool((after < before).any()) else 1.0


def _dequant_arguments(device: torch.device) -> tuple[Any, ...]:
    codes = torch.randint(0, 120, (EXPERTS, ROWS, INPUTS), generator=_generator(), dtype=torch.uint8)
    scales = torch.linspace(0.01, 0.02, EXPERTS * 4).view(EXPERTS, 1, 4)
    return codes.to(device), scales.to(device), None, ROWS, INPUTS // 4, torch.float32, False, "float", True


def _dequant_error(backend: str, device: torch.device) -> float:
    """One rounding, of the product."""
    codes, scales, *_ = _dequant_arguments(device)
    dense = dequant.dequantize_fp8(codes.view(torch.float8_e4m3fn), scales, dtype=torch.float32, backend=backend)
    exact = codes.cpu().view(torch.float8_e4m3fn).double() * scales.cpu().double().repeat_interleave(INPUTS // 4, -1)
    return relative_error(dense.cpu(), exact)


def _prepared(device: torch.device, layout: str, rows: int = ROWS) -> tuple[Any, Tensor]:
    """A weight [EXPERTS, rows, INPUTS] in a layout, and what it stands for in float64."""
    quantized = random_quantized(_generator(), (EXPERTS, rows, INPUTS), INPUTS // GROUP, BITS,
                                 scale_dtype=torch.bfloat16)  # fmt: skip
    prepared = w4a16.repack(quantized.codes, quantized.scales, None, bits=BITS, dtype=torch.bfloat16, device=device,
                             layout=layout)  # fmt: skip
    return prepared, dequantize(quantized).double()


def _matmul_arguments(tokens: int, device: torch.device) -> tuple[Any, ...]:
    x, offsets = _rows(tokens)
    layout = LAYOUTS["triton" if device.type == "cuda" else "cpu"]
    return x.to(device), _prepared(device, layout)[0], offsets.to(device), None


def _matmul_error(tokens: int, backend: str, device: torch.device) -> float:
    """bf16 weights and results, fp32 sums: a few parts in a thousand."""
    x, offsets = _rows(tokens)
    weight, exact = _prepared(device, LAYOUTS[backend])
    actual = w4a16.w4a16_matmul(x.to(device), weight, offsets.to(device), backend=backend)
    want = torch.cat([part.double() @ matrix.T for part, matrix in zip((x[:7], x[7:]), exact)])
    return relative_error(actual.cpu(), want)


def _routing(tokens: int, device: torch.device) -> w4a16.Routing:
    """Every token goes to both experts: rows of the first, then of the second, with weights of their own."""
    every = torch.arange(tokens)
    weights = torch.linspace(0.1, 0.9, EXPERTS * tokens).bfloat16()
    parts = (torch.tensor([0, tokens, 2 * tokens]), every.repeat(2), torch.stack([every, every + tokens]), weights)
    return w4a16.Routing(*(part.to(device) for part in parts))


def _experts_arguments(tokens: int, device: torch.device) -> tuple[Any, ...]:
    layout = LAYOUTS["triton" if device.type == "cuda" else "cpu"]
    first, second = _prepared(device, layout, 2 * INPUTS)[0], _prepared(device, layout)[0]
    return _rows(tokens)[0].to(device), first, second, _routing(tokens, device)


def _experts_error(tokens: int, backend: str, device: torch.device) -> float:
    """Step by step in float64; as the product, and the hidden rows are rounded to bf16 once or twice more."""
    x, routing = _rows(tokens)[0], _routing(tokens, device)
    (first, gate_up), (second, down) = (_prepared(device, LAYOUTS[backend], rows) for rows in (2 * INPUTS, ROWS))
    actual = w4a16.w4a16_experts(x.to(device), first, second, routing, backend=backend)
    want = torch.zeros(tokens, ROWS, dtype=torch.float64)
    for matrices, share in zip(zip(gate_up, down), routing.weights.cpu().double().view(EXPERTS, tokens, 1)):
        gate, up = (x.double() @ matrices[0].T).chunk(2, -1)
        want += share * ((torch.nn.functional.silu(gate) * up) @ matrices[1].T)
    return relative_error(actual.cpu(), want)


def _of(room: Any, op: str) -> Callable[[torch.device], Sequence[Implementation]]:
    return lambda device: fastest_first(room.implementations()[op], torch.empty(0, device=device))


def _many_and_few(
    op: str, room: Any, arguments: Callable[..., tuple[Any, ...]], error: Callable[..., float]
) -> list[Probe]:
    """A product on packed weights, whose implementations take different numbers of rows: each has to take one."""
    return [
        Probe(op, lambda device: room.implementations(torch.empty(0, device=device)), partial(arguments, tokens),
              partial(error, tokens), 1e-2, case)
        for tokens, case in ((TOKENS, ""), (FEW, "few rows"))
    ]  # fmt: skip


PROBES = (
    Probe("gram_accumulate_", _of(gram, "gram_accumulate_"),
          lambda device: (*_sums(device), *(each.to(device) for each in _rows())), _accumulate_error, 1e-5),
    Probe("gram_finalize", _of(gram, "gram_finalize"), _finalize_arguments, _finalize_error, 1e-6),
    Probe("cholesky_upper", _of(gram, "cholesky_upper"), _cholesky_arguments, _cholesky_error, 1e-5),
    Probe("cross_gram_accumulate_", _of(gram, "cross_gram_accumulate_"), _cross_arguments, _cross_error, 2.0**-15),
    Probe("fit_grid", _of(columns, "fit_grid"),
          lambda device: (_weight(device), None, GROUP, columns.GridRule(**RULE)), _fit_error, 2.0**-8),
    Probe("round_to_grid", _of(columns, "round_to_grid"),
          lambda device: (_weight(device), *columns.fit_grid(_weight(device), None, group_size=GROUP, **RULE), BITS),
          _round_error, 0.0),
    Probe("quantize_columns", _of(columns, "quantize_columns"), _columns_arguments, _columns_error, 1e-3),
    Probe("coordinate_descent", _of(columns, "coordinate_descent"), _descent_arguments, _descent_error, 1e-5),
    Probe("dequantize", _of(dequant, "dequantize"), _dequant_arguments, _dequant_error, 1e-7),
    *_many_and_few("w4a16_matmul", w4a16, _matmul_arguments, _matmul_error),
    *_many_and_few("w4a16_experts", experts, _experts_arguments, _experts_error),
)  # fmt: skip

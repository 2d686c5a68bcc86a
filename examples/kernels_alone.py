"""The kernels without a model: from activations and a weight to codes, and to a product with the packed weight.

    python examples/kernels_alone.py

Tensors in, tensors out, on a CPU or a GPU. Every call has an expert axis E; one layer is E = 1.
"""

from __future__ import annotations

import torch

from sarqc_kernels import (
    fit_grid,
    gram_accumulate_,
    quantize_columns,
    repack,
    round_to_grid,
    symmetrize_,
    w4a16_matmul,
)

E, N, K, T = 1, 256, 512, 2048
FORM = dict(bits=4, group_size=64, sym=True, search=False, scale_dtype=torch.bfloat16)


def correlated(rows: int, mix: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Activations bf16 [rows, K] whose inputs depend on each other, as those of a network do."""
    return (torch.randn(rows, K, generator=generator) @ mix).bfloat16()


def main(device: str = "cuda" if torch.cuda.is_available() else "cpu") -> dict[str, float]:
    """Relative output errors of RTN, of error feedback, and of the packed product of the latter."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(K, K, generator=generator) * torch.logspace(0, -2, K)[:, None]
    weight = torch.randn(E, N, K, generator=generator).to(device)

    # 1. What the inputs look like: X^T X, added up over batches.
    gram = torch.zeros(E, K, K, device=device)
    rows = torch.zeros(E, dtype=torch.int64, device=device)
    abs_sum = torch.zeros(E, K, device=device)
    for _ in range(4):
        gram_accumulate_(gram, rows, abs_sum, correlated(T // 4, mix, generator).to(device), None)
    hessian = symmetrize_(gram) / rows[:, None, None]
    hessian += 0.01 * hessian.diagonal(dim1=1, dim2=2).mean() * torch.eye(K, device=device)

    # 2. Codes with error feedback. M is upper triangular with M M^T = H: one Cholesky of the flipped matrix.
    factor = torch.linalg.cholesky(hessian.flip(1, 2)).flip(1, 2).contiguous()
    codes, scales, _ = quantize_columns(weight, factor, **FORM)  # symmetric: no zeros
    plain_scales, plain_zeros = fit_grid(weight, None, **FORM)
    plain = round_to_grid(weight, plain_scales, plain_zeros, bits=4)

    # 3. The product with the packed weight, on activations that the Gram never saw.
    x = correlated(T, mix, generator).to(device)
    exact = x.float() @ weight[0].T
    errors = {}
    for name, parts in {"rounding": (plain, plain_scales), "feedback": (codes, scales)}.items():
        packed = repack(*parts, None, bits=4, dtype=x.dtype, device=device)  # None: symmetric, zero is 8
        actual = w4a16_matmul(x, packed).float()
        errors[name] = float((actual - exact).square().sum() / exact.square().sum())
        held = packed.words.nbytes + packed.scales.nbytes
        print(f"{name:<9} output error {errors[name]:.2e}, {8 * held / weight.numel():.2f} bits a weight in memory")
    return errors


if __name__ == "__main__":
    main()

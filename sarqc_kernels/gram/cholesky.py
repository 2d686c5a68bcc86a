"""The factor of a Hessian: M upper triangular with M M^T = H, for a batch of matrices.

Of few matrices, torch's `cholesky_ex` (cuSOLVER on a GPU) of the matrix with both axes reversed gives M with both axes
reversed. For many it calls a batched routine or one after another, and most of a GPU stands idle: there a program of
our own takes each matrix. `is_faster` counts where that is faster; neither was timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sarqc_kernels.backend import Implementation, pick, takes_all
from sarqc_kernels.device import Device, device_info, fastest_first, triton_unsupported
from sarqc_kernels.errors import ArgumentError

__all__ = ["cholesky_upper", "implementations", "is_faster"]

RATE = 0.45e12
"""Flops a second of a program on a multiprocessor of its own: three TF32 products each, and the chain of pivots."""

CUSOLVER = 0.5e-6
"""Seconds for each input of a matrix that others measured on an L40S: 0.95 ms at 2048 inputs, 2.37 at 4096."""


def is_faster(experts: int, inputs: int, device: Device) -> bool:
    """Whether a program for each matrix is counted to take half as long as cuSOLVER, one matrix after another."""
    return 2 * -(-experts // device.multiprocessors) * inputs**3 / 3 / RATE < experts * inputs * CUSOLVER


PANELS_FROM, PANEL = 1024, 192
"""Inputs from which on a CPU takes panels of columns, and their width. LAPACK reaches a fifth of the rate of a product
there (47 of 250 GFLOP/s on two cores of a Xeon with AVX-512), panels a third."""


def _reference(hessian: Tensor) -> tuple[Tensor, Tensor]:
    if hessian.device.type == "cpu" and hessian.shape[1] >= PANELS_FROM:
        upper = hessian.clone(memory_format=torch.contiguous_format)
        return upper, torch.stack([_by_panels_(matrix) for matrix in upper])
    upper, info = _by_lapack(hessian)
    # On a CPU columns stay in one piece, as LAPACK leaves them: products with another layout sum in another order.
    return upper if upper.device.type == "cpu" else upper.contiguous(), info


def _by_lapack(hessian: Tensor) -> tuple[Tensor, Tensor]:
    lower, info = torch.linalg.cholesky_ex(hessian.flip(-1, -2))
    return lower.flip(-1, -2), info


def _by_panels_(upper: Tensor) -> Tensor:
    """Factor one matrix in place, left-looking from the last panel: a product for all that the panels behind it take
    away, then its own factor, and a triangular solve for the rows above."""
    info = torch.zeros((), dtype=torch.int32)
    for stop in range(len(upper), 0, -PANEL):
        start = max(stop - PANEL, 0)
        panel, behind = upper[:stop, start:stop], upper[:stop, stop:]
        panel.addmm_(behind, behind[start:].T, alpha=-1)
        own, failed = _by_lapack(panel[start:])
        info = torch.maximum(info, failed)
        panel[start:] = own
        panel[:start] = torch.linalg.solve_triangular(own.T, panel[:start], upper=False, left=False)
    upper.triu_()
    return info


def _unsupported(hessian: Tensor) -> str | None:
    """Why the Triton kernel cannot take the call; None where it can."""
    if reason := triton_unsupported(hessian):
        return reason
    if hessian.shape[1] > 46_336:
        return f"{hessian.shape[1]} inputs, it takes up to 46336: elements of a matrix are counted in 32 bits"
    return None


def _triton(hessian: Tensor) -> tuple[Tensor, Tensor]:
    from sarqc_kernels.gram import cholesky_impl

    return cholesky_impl.cholesky_upper(hessian)


_CHOLESKY = (Implementation("triton", _unsupported, _triton), Implementation("reference", takes_all, _reference))


def implementations() -> dict[str, Sequence[Implementation]]:
    """Implementations of the operation; for `backend.explain`."""
    return {"cholesky_upper": _CHOLESKY}


def cholesky_upper(hessian: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Factor a batch of symmetric matrices.

    Args:
        hessian: fp32 [E, K, K], symmetric.
        backend: a name from `backend.BACKENDS`, or None for the one that is counted to be the fastest.

    Returns:
        M fp32 [E, K, K], upper triangular with M M^T = H, and int32 [E], 0 where the matrix is positive definite.
        Of another the factor is undefined. Nothing waits for the device.

    Raises:
        ArgumentError: another dtype or shape.
    """
    if hessian.dim() != 3 or hessian.shape[1] != hessian.shape[2] or hessian.dtype != torch.float32:
        raise ArgumentError(
            f"hessian is {hessian.dtype} {list(hessian.shape)}: pass torch.float32 [experts, inputs, inputs]"
        )
    result: tuple[Tensor, Tensor] = _cholesky_upper(hessian, backend)
    return result


@torch.library.custom_op("sarqc::cholesky_upper", mutates_args=())
def _cholesky_upper(hessian: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    own_first = is_faster(hessian.shape[0], hessian.shape[1], device_info(hessian.device))
    ranked = fastest_first(_CHOLESKY if own_first else _CHOLESKY[::-1], hessian)
    result: tuple[Tensor, Tensor] = pick("cholesky_upper", ranked, (hessian,), backend).run(hessian)
    return result


@_cholesky_upper.register_fake
def _(hessian: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    upper = torch.empty_like(hessian, memory_format=torch.contiguous_format)
    info = hessian.new_empty(hessian.shape[:1], dtype=torch.int32)
    by_lapack = hessian.device.type == "cpu" and backend != "triton" and hessian.shape[1] < PANELS_FROM
    return upper.mT if by_lapack else upper, info

"""Parts of a call on torch's threads, or on new ones."""

from __future__ import annotations

import ctypes

import pytest
import torch

from sarqc_kernels import cpu_parts
from sarqc_kernels.gram import cpu_impl
from sarqc_kernels.gram.reference import symmetrize_

EXPERTS, INPUTS = 3, 70  # nine bands of rows


@pytest.fixture(autouse=True)
def library() -> ctypes.CDLL:
    """What the parts are of."""
    if reason := cpu_impl.finalize_unsupported(torch.zeros(1, 1, 1)):
        pytest.skip(reason)
    return cpu_impl._library()


def all_done(library: ctypes.CDLL, parts: int) -> bool:
    """Whether each part was done: a matrix that no part made keeps its NaN."""
    total = torch.randn(EXPERTS, INPUTS, INPUTS)
    out, divisor = torch.full_like(total, torch.nan), torch.full((EXPERTS,), 2.0)
    call = cpu_impl.Mean(
        sum=total.data_ptr(), divisor=divisor.data_ptr(), out=out.data_ptr(), experts=EXPERTS, size=INPUTS
    )
    cpu_parts.in_parts(library.sarqc_mean, call, parts)
    return torch.equal(out, symmetrize_(total / 2))


@pytest.mark.parametrize("parts", [1, 2, 5, 16])
def test_every_part_is_done(library: ctypes.CDLL, parts: int) -> None:
    assert all_done(library, parts)


@pytest.mark.parametrize("parts", [2, 5])
def test_without_gnus_openmp(library: ctypes.CDLL, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_parts, "_loaded_openmp", lambda: None)
    cpu_parts._team.cache_clear()
    try:
        assert all_done(library, parts) and cpu_parts._team() is None
    finally:
        cpu_parts._team.cache_clear()


def test_a_team_smaller_than_the_parts_does_them_all(library: ctypes.CDLL) -> None:
    openmp = cpu_parts._loaded_openmp()
    if openmp is None:
        pytest.skip("torch has not loaded GNU's OpenMP")
    limit = openmp.omp_get_max_active_levels()
    openmp.omp_set_max_active_levels(0)  # every region is of one thread
    try:
        assert all_done(library, 5)
    finally:
        openmp.omp_set_max_active_levels(limit)

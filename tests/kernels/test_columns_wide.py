"""Factors of more than 2^31 elements: the last panel of 53,248 columns, as in Llama-3.1-405B, with what is before it.

The factor is 11 GB of addresses: only pages that are written take memory. The walk's last panel is run alone: what
it reads lies beyond 2^31 elements, so an offset of 32 bits reads something else, or ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sarqc_kernels.columns import panels
from sarqc_kernels.columns.config import MICRO, PANEL, Config
from sarqc_kernels.columns.grid import GridRule, Problem
from sarqc_kernels.columns.reference import quantize_columns
from tests.kernels.columns_cases import TorchProducts
from tests.kernels.test_columns_csrc import compiled

COLUMNS, ROWS, TAIL = 53_248, 3, 2 * PANEL
RULE = GridRule(4, True, False, torch.float32)


@pytest.fixture(scope="module")
def work() -> panels.Work:
    generator = torch.Generator().manual_seed(0)
    memory = mmap.mmap(-1, 4 * COLUMNS * COLUMNS)
    memory.madvise(getattr(mmap, "MADV_NOHUGEPAGE", mmap.MADV_NORMAL))  # a large page would be filled for one number
    factor = torch.frombuffer(memory, dtype=torch.float32).view(1, COLUMNS, COLUMNS)
    factor[0, -TAIL:, -TAIL:] = torch.randn(TAIL, TAIL, generator=generator).triu(1) / 8 + torch.eye(TAIL)
    weight = torch.randn(1, COLUMNS, ROWS, generator=generator)
    return panels.Work(
        weight=weight,
        delta=torch.zeros_like(weight),
        codes=torch.zeros_like(weight, dtype=torch.uint8),
        pull=torch.empty(1, PANEL, ROWS),
        ahead=torch.empty(1, MICRO, ROWS),
        scales=torch.full((1, 1, ROWS), 0.25),
        zeros=torch.full((1, 1, ROWS), 8.0),
        factor=factor,
        usable=torch.ones(1, dtype=torch.int32),
        inverse=torch.ones(1, COLUMNS),
        importance=torch.ones(1, COLUMNS),
        group_of=torch.zeros(1, COLUMNS, dtype=torch.int32),
        group_size=COLUMNS,
        rule=RULE,
    )


def wanted(work: panels.Work) -> Tensor:
    """Codes [TAIL, ROWS] of the last two panels: no column before them asks anything of them."""
    weight = work.weight[:, -TAIL:].mT.contiguous()
    scales, zeros = work.scales.mT, work.zeros.mT.to(torch.uint8)
    problem = Problem(weight, work.factor[:, -TAIL:, -TAIL:].contiguous(), None, scales, zeros, TAIL, RULE)
    return quantize_columns(problem)[0][0].T


def last_panels(steps: panels.Steps, work: panels.Work) -> Tensor:
    work.delta.zero_()
    for first in (COLUMNS - TAIL, COLUMNS - PANEL):
        steps.pull(work, first, first + PANEL)
        steps.columns(work, first, first + PANEL, "round")
    return work.codes[0, -TAIL:]


def test_triton(work: panels.Work, device: str) -> None:
    triton_impl = pytest.importorskip("sarqc_kernels.columns.triton_impl")
    if device == "cuda":
        pytest.skip("written for the interpreter")
    steps = triton_impl.Steps(Config(128, 32, 2048, 4, 1, 32))  # a deep product: the interpreter pays by the step
    assert torch.equal(last_panels(steps, work), wanted(work))


def test_csrc(work: panels.Work, tmp_path: Path) -> None:
    class Steps(TorchProducts):
        def columns(self, work: panels.Work, first: int, last: int, action: panels.Action) -> None:
            from sarqc_kernels.columns import cuda_impl

            assert library.sarqc_columns(cuda_impl.launch_arguments(work, first, last, action), 1, None) == 0

    library: ctypes.CDLL = compiled(tmp_path)
    assert torch.equal(last_panels(Steps(), work), wanted(work))

"""A call skips torch's dispatcher only where nobody would notice: who looks still sees the operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sarqc_kernels import w4a16_matmul
from sarqc_kernels.backend import ENVIRONMENT
from sarqc_kernels.errors import ArgumentError, BackendError
from sarqc_kernels.fast_path import takes_fast_path
from sarqc_kernels.testing import random_quantized
from sarqc_kernels.w4a16 import RepackedWeight, matmul, repack


class Seen(TorchDispatchMode):
    """Keeps the names of what goes through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def weight(generator: torch.Generator) -> RepackedWeight:
    drawn = random_quantized(generator, (1, 64, 64), 2, 4, scale_dtype=torch.bfloat16)
    return repack(drawn.codes, drawn.scales, None, bits=4)


def test_both_ways_give_the_same_bits(weight: RepackedWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    direct = w4a16_matmul(x, weight)
    monkeypatch.setattr(matmul, "takes_fast_path", lambda x: False)
    assert torch.equal(direct, w4a16_matmul(x, weight))


def test_a_mode_sees_the_operation(weight: RepackedWeight) -> None:
    x = torch.ones(2, 64)
    with Seen() as seen:
        w4a16_matmul(x, weight)
    assert seen.names == ["sarqc.w4a16_matmul.default"]


def test_what_is_not_plain_is_watched() -> None:
    assert takes_fast_path(torch.ones(2))
    with Seen():
        assert not takes_fast_path(torch.ones(2))
    with FakeTensorMode():
        fake = torch.ones(2)
    assert not takes_fast_path(fake)  # and outside of its mode
    assert not takes_fast_path(torch.nn.Parameter(torch.ones(2)))
    assert not takes_fast_path(torch.ones(2, requires_grad=True))
    assert not takes_fast_path(torch.ones(2, device="meta"))


def test_a_compiler_sees_the_operation(weight: RepackedWeight) -> None:
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.code)
        return module.forward

    compiled = torch.compile(lambda x: w4a16_matmul(x, weight), fullgraph=True, backend=backend)
    x = torch.ones(2, 64)
    assert torch.equal(compiled(x), w4a16_matmul(x, weight))
    assert len(graphs) == 1 and "sarqc.w4a16_matmul" in graphs[0]


def test_nothing_is_checked_less(weight: RepackedWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="x is"):
        w4a16_matmul(torch.ones(2, 60), weight)
    with pytest.raises(ArgumentError, match="do not cut"):
        w4a16_matmul(torch.ones(2, 64), weight, torch.tensor([0, 3]))
    monkeypatch.setenv(ENVIRONMENT, "cuda")
    with pytest.raises(BackendError, match="SARQC_BACKEND = 'cuda' cannot run"):
        w4a16_matmul(torch.ones(2, 64), weight)

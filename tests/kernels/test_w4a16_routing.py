"""The sort of choices by expert: every implementation gives the very rows of a slow one, in one launch on a GPU."""

from __future__ import annotations

import pytest
import torch

from sarqc_kernels import ArgumentError
from sarqc_kernels.testing import poisoned_empty
from sarqc_kernels.w4a16 import route
from tests.kernels.test_w4a16_experts import routed

CASES = [(1, 1, 1), (1, 8, 128), (5, 2, 3), (33, 4, 9), (300, 8, 16), (1, 2, 256), (0, 2, 3), (130, 8, 8)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_those_of_a_slow_sort(
    case: tuple[int, int, int], backend: str, device: str, generator: torch.Generator
) -> None:
    """Offsets, slots and what belongs to a row. Within an expert rows stand in the order of choices, then tokens."""
    tokens, top_k, experts = case
    choices = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k].contiguous()
    weights = torch.rand(tokens, top_k, generator=generator).bfloat16()
    with poisoned_empty():
        result = route(choices.to(device), weights.to(device), experts, backend=backend)
    result = type(result)(*(part.cpu() for part in result))
    slow = routed(choices, weights, experts)
    assert torch.equal(result.offsets, slow.offsets) and result.slots.shape == (top_k, tokens)
    pairs = sorted((int(e), c, t) for t, row in enumerate(choices.tolist()) for c, e in enumerate(row))
    assert result.tokens.tolist() == [t for _, _, t in pairs]
    assert torch.equal(result.weights, torch.tensor([float(weights[t, c]) for _, c, t in pairs]).bfloat16())
    for token in range(tokens):
        rows = result.slots[:, token].tolist()
        assert rows == sorted(rows) and all(result.tokens[row] == token for row in rows) and len(set(rows)) == top_k


def test_a_token_may_choose_an_expert_twice(backend: str, device: str) -> None:
    choices = torch.tensor([[1, 1], [0, 1]], device=device)
    result = route(choices, torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device), 2, backend=backend)
    assert result.offsets.tolist() == [0, 1, 4] and result.tokens.tolist() == [1, 0, 0, 1]
    assert result.weights.tolist() == [3.0, 1.0, 2.0, 4.0] and result.slots.T.tolist() == [[1, 2], [0, 3]]


def test_strided_choices(backend: str, device: str, generator: torch.Generator) -> None:
    wide = torch.randint(0, 5, (7, 6), generator=generator).to(device)
    weights = torch.rand(6, 7, generator=generator).to(device).T
    result, same = (
        route(choices, share, 5, backend=backend)
        for choices, share in (
            (wide[:, ::2], weights[:, ::2]),
            (wide[:, ::2].contiguous(), weights[:, ::2].contiguous()),
        )
    )
    assert all(torch.equal(*pair) for pair in zip(result, same))


def test_one_launch(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    launcher = pytest.importorskip("sarqc_kernels.w4a16.triton.route")
    launches = []

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launches.append(grid)
            return kernel[grid]

    kernel = launcher.route_kernel
    monkeypatch.setattr(launcher, "route_kernel", Counted())
    launcher.route(torch.tensor([[0, 2]], device=device), torch.ones(1, 2, device=device), 3)
    assert launches == [(3,)]


def test_refuses_what_does_not_fit() -> None:
    choices, weights = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
    for args, words in (
        ((choices.int(), weights, 4), "choices is torch.int32"),
        ((choices[0], weights, 4), r"choices is torch.int64 \[2\]"),
        ((choices, weights[:2], 4), r"weights is torch.float32 \[2, 2\]"),
        ((choices, weights.to("meta"), 4), "weights is on meta"),
    ):
        with pytest.raises(ArgumentError, match=words):
            route(*args)


def test_opcheck(generator: torch.Generator) -> None:
    choices = torch.randint(0, 4, (5, 2), generator=generator)
    torch.library.opcheck(torch.ops.sarqc.route.default, (choices, torch.rand(5, 2, generator=generator), 4))

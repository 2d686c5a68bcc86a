"""What the tests of column quantization share: cases, the step-by-step twin of the device code, exact inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sarqc_kernels.columns.grid import GridRule, fit_tile
from sarqc_kernels.columns.panels import Work


@dataclass(frozen=True)
class Case:
    """A problem; `order`: none, or groups shuffled and columns within them, or (given grids) any order at all."""

    experts: int
    rows: int
    columns: int
    group_size: int
    bits: int = 4
    sym: bool = True
    search: bool = False
    given: bool = False
    order: str = "none"
    dtype: torch.dtype = torch.float16

    def __str__(self) -> str:
        shape = f"{self.experts}x{self.rows}x{self.columns}g{self.group_size}-{self.bits}bit"
        words = ["sym" if self.sym else "asym", "search" * self.search, "given" * self.given, self.order]
        return "-".join([shape, *filter(None, words), str(self.dtype).removeprefix("torch.")])

    @property
    def rule(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, "sym": self.sym, "search": self.search,
                "scale_dtype": self.dtype}  # fmt: skip

    def processing_order(self, generator: torch.Generator) -> Tensor | None:
        """int64 [E, K], or None."""
        if self.order == "none":
            return None
        size = 1 if self.order == "any" else self.group_size
        rows = []
        for _ in range(self.experts):
            groups = torch.randperm(self.columns // size, generator=generator) * size
            rows.append(torch.cat([group + torch.randperm(size, generator=generator) for group in groups]))
        return torch.stack(rows)


class TorchProducts:
    """The steps that csrc leaves to Triton, in plain torch."""

    def pull(self, work: Work, first: int, last: int) -> None:
        for expert in range(work.experts):
            ask = work.factor[expert, :first, first:last].T @ work.delta[expert, :first]
            work.pull[expert, : last - first] = ask if work.usable[expert] else 0.0

    def fit(self, work: Work, first: int, last: int) -> None:
        group = (work.weight - work.delta)[:, first:last].transpose(0, 1)
        scales, zeros = fit_tile(group.contiguous(), work.importance[:, first:last].T, work.rule)
        for expert in range(work.experts):
            at = int(work.group_of[expert, first])
            work.scales[expert, at], work.zeros[expert, at] = scales[expert], zeros[expert]


def exact_inputs(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, factor, scales and zeros so coarse that every sum is exact in fp32, in any order and as three TF32.

    Weights are multiples of 1/16 and scales powers of two, so errors are multiples of 1/16; M has a diagonal of 1 and
    2 and multiples of 1/4 above. Many values lie exactly between two codes: half-even shows.
    """
    experts, rows, columns = case.experts, case.rows, case.columns
    shape = (experts, rows, columns // case.group_size)
    weight = torch.randint(-16, 17, (experts, rows, columns), generator=generator) / 16
    factor = torch.randint(-2, 3, (experts, columns, columns), generator=generator) / 4
    factor *= torch.rand(factor.shape, generator=generator) < 0.2
    diagonal = 2.0 ** torch.randint(0, 2, (experts, columns), generator=generator)
    factor = factor.triu(1) + torch.diag_embed(diagonal)
    scales = (2.0 ** -torch.randint(2, 4, shape, generator=generator)).to(case.dtype)
    zeros = torch.randint(0, 1 << case.bits, shape, generator=generator, dtype=torch.uint8)
    return weight, factor, scales, zeros


def assert_alike(got: tuple[Tensor, ...], want: tuple[Tensor, ...], share: float = 0.999) -> None:
    """(codes, scales, zeros) are the same but for at most one code in a thousand and one grid in a hundred or two.

    A grid counts as the same within 32 units in the last place of fp32: the compensated group is a sum, and each of its
    products may be off by 16 of them where it is three of TF32 (seen with these: 15).
    """
    for ours, theirs in zip(got, want):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.device == theirs.device
    assert float((got[0] == want[0]).float().mean()) >= share
    near = torch.isclose(got[1].float(), want[1].float(), rtol=32 * torch.finfo(torch.float32).eps, atol=0.0)
    assert int((~near | (got[2] != want[2])).sum()) <= max(2, near.numel() // 100)


def assert_recurrence(case: Case, problem: tuple[Tensor, Tensor, Tensor | None], result: tuple[Tensor, ...]) -> None:
    """Codes, and grids that were fitted, are those of the recurrence in float64 fed with the codes as they are.

    So no earlier difference can carry on, and each is judged alone: one code that a last bit turned turns others behind
    it, which for a small matrix, or in a long row, is more than any share that two implementations could be held to.
    All tensors are on one device, the factor in float64.
    """
    (weight, factor, order), (codes, scales, zeros) = problem, result
    scale, zero = (part.double().repeat_interleave(case.group_size, -1) for part in (scales, zeros))
    order = torch.arange(case.columns, device=weight.device).expand(case.experts, -1) if order is None else order
    at = order[:, None, :].expand_as(weight)
    w, scale, zero, codes = (part.double().gather(2, at) for part in (weight, scale, zero, codes))
    delta, top = w - (codes - zero) * scale, (1 << case.bits) - 1
    pull = torch.matmul(delta, factor.triu(1)) / factor.diagonal(dim1=1, dim2=2)[:, None]
    steps = (w + pull) / scale
    level = torch.minimum(torch.maximum(steps.round(), -zero), top - zero)
    half_way = ((steps - steps.floor() - 0.5).abs() < 1e-3 * (1 + steps.abs())) | (scale.abs() < 1e-30)
    assert ((level == codes - zero) | half_way).all()
    for begin in range(0, 0 if case.given else case.columns, case.group_size):
        own = slice(begin, begin + case.group_size)
        inverse = torch.linalg.inv(factor[:, own, own])
        moved = w[..., own] + delta[..., :begin] @ factor[:, :begin, own] @ inverse
        terms = w[..., own].abs() + delta[..., :begin].abs() @ factor[:, :begin, own].abs() @ inverse.abs()
        slack = 1e-5 * terms.amax(-1)
        if case.search:
            importance = factor.diagonal(dim1=1, dim2=2)[:, own].square()
            _assert_searched(case, moved, importance, (scale[..., begin], zero[..., begin]), slack)
            continue
        low, high = moved.amin(-1).clamp(max=0), moved.amax(-1).clamp(min=0)
        span = 2 * torch.maximum(-low, high) if case.sym else high - low
        kept, actual = torch.finfo(case.dtype), scale[..., begin]
        assert ((actual * top - span).abs() <= 2 * slack + top * (kept.eps * actual + kept.tiny)).all()
        exact = (-low / actual).clamp(0, top)
        middle = 1 << (case.bits - 1)
        assert case.sym or ((zero[..., begin] - exact).abs() <= 0.5 + slack / actual).all()
        assert not case.sym or (zero[..., begin] == middle).all()


def _assert_searched(case: Case, group: Tensor, importance: Tensor, grid: tuple[Tensor, Tensor], slack: Tensor) -> None:
    """The grid [E, N] of a group [E, N, g] is that of the reference but for one in a hundred or two, and none is worse.

    Which of two trials with nearly the same loss is taken hangs on the last bits, and so does which of two neighbouring
    scales of 16 bits: the neighbour of every scale in bf16 was seen to lose 3 % at most. 10 % are allowed.
    """
    rule, (scale, zero), kept = GridRule(case.bits, case.sym, True, case.dtype), grid, torch.finfo(case.dtype)
    tile, counts = group.permute(2, 0, 1).float().contiguous(), importance.T.float().contiguous()
    want_scale, want_zero = (part.double() for part in fit_tile(tile, counts, rule))
    near = (scale - want_scale).abs() * rule.top <= 2 * slack + rule.top * (kept.eps * scale.abs() + kept.tiny)
    assert int((~near | (zero != want_zero)).sum()) <= max(2, near.numel() // 100)

    def loss(scale: Tensor, zero: Tensor) -> Tensor:
        scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
        steps = group / scale
        level = torch.minimum(torch.maximum(steps.round(), -zero), rule.top - zero)
        result: Tensor = (((level - steps) * scale).square() * importance.unsqueeze(1)).sum(-1)
        return result

    assert (loss(scale, zero) <= 1.1 * loss(want_scale, want_zero) + 1e-30).all()

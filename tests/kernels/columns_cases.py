"""What the tests of column quantization share: cases, the step-by-step twin of the device code, exact inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sarqc_kernels.columns.grid import fit_tile
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

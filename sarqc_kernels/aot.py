"""What to compile where no GPU is at hand: each module that launches Triton kernels lists them in `aot_jobs()`.

`benchmarks.aot` compiles the jobs and holds their machine code to what they say. Nothing here imports triton.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ARCHS", "AotJob"]

ARCHS = (80, 90, 100)
"""Compute capabilities (times ten) whose machine code is checked ahead of time."""


@dataclass(frozen=True)
class AotJob:
    """One kernel to compile where no card is at hand, and what its machine code must show.

    name: unique; shows in the table. kernel: the `@triton.jit` function. signature: type of each run-time argument as
    Triton spells it ("*bf16", "i32", "tensordesc<bf16[64, 128]>"). constants: value of each `tl.constexpr`.
    divisible: run-time arguments (pointers, sizes, strides) that are multiples of 16, as a launch would find out.
    options: num_warps, num_stages. instructions: machine instructions that must occur, such as "HGMMA" or "HGMMA from
    registers" (then all of them). Spills and shared memory are checked for every job.
    """

    name: str
    kernel: Any
    arch: int
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    divisible: Sequence[str] = ()
    instructions: Sequence[str] = field(default=())

"""The nouns of a benchmark: Point, Contender, Op, Roof."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
"""What one call works on: tensors and numbers by name. A cold measurement makes several of them."""

Call = Callable[[], Any]
"""One run of a contender on inputs of its own; returns what `Op.error` judges."""


@dataclass(frozen=True)
class Roof:
    """What this machine does: bytes read and written in a second by a copy, and bf16 flops of a large product."""

    bandwidth: float
    flops: float

    def seconds(self, point: Point) -> float:
        """The least time of a point: its bytes or its flops, whichever takes longer."""
        return max(point.traffic / self.bandwidth, point.flops / self.flops)

    def bound(self, point: Point) -> str:
        """Which of the two it is."""
        return "memory" if point.traffic / self.bandwidth > point.flops / self.flops else "compute"


H200 = Roof(bandwidth=4.3e12, flops=780e12)
"""For predictions: 4.3 TB/s of a copy and 769 to 798 TFLOP/s of dense bf16 on random data, as published; not ours."""


@dataclass(frozen=True)
class Point:
    """One shape.

    name: unique within an op. why: whose shape it is, or what it shows. sizes: its numbers by name. flops: of the least
    work that gives the result (a triangle, not a square). traffic: bytes that must be read or written at least once.
    rank: order of importance, 0 first; what no time is left for is cut from the end. goal: share of the roof that is
    aimed at on an H200, or None. goal_seconds: the same where a goal is a time, not a share.
    """

    name: str
    why: str
    sizes: Mapping[str, int]
    flops: float
    traffic: float
    rank: int = 1
    goal: float | None = None
    goal_seconds: float | None = None


@dataclass(frozen=True)
class Contender:
    """One way to compute an op.

    unsupported: (point, device) -> the reason why it cannot run, None if it can; cheap, imports nothing heavy. bind:
    inputs -> a call; may prepare (pack, convert) as long as it likes, only the call is timed. ours: whose it is.
    part: "whole", or which step of the whole it times alone.
    """

    name: str
    ours: bool
    unsupported: Callable[[Point, torch.device], str | None]
    bind: Callable[[Inputs], Call]
    part: str = "whole"


@dataclass(frozen=True)
class Op:
    """An operation to measure.

    tests: the test files that gate it. points: quick -> shapes. inputs: (point, device, generator) -> inputs of one
    call. contenders: ours first. error: (inputs, result) -> how far off the result of a "whole" call is; a contender
    beyond `most_error` is not timed. meaning: what that number is.
    """

    name: str
    tests: Sequence[str]
    points: Callable[[bool], list[Point]]
    inputs: Callable[[Point, torch.device, torch.Generator], Inputs]
    contenders: Sequence[Contender]
    error: Callable[[Inputs, Any], float]
    most_error: float
    meaning: str


def runs_anywhere(point: Point, device: torch.device) -> str | None:
    """The `unsupported` of what every machine has."""
    return None


def on_gpu_only(point: Point, device: torch.device) -> str | None:
    """The `unsupported` of what needs an NVIDIA card."""
    return None if device.type == "cuda" else f"needs an NVIDIA card, tensors are on {device.type}"


def no_interpreter(backend: str, device: torch.device) -> str | None:
    """Why an implementation in Triton is not timed on a CPU, where it could run in the interpreter; None otherwise."""
    if backend == "triton" and device.type == "cpu":
        return "on a CPU there is the interpreter alone, whose times mean nothing"
    return None


def installed(package: str) -> str | None:
    """Why a rival that comes as a package cannot run; `package` is the name it is imported by."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random normal numbers where the generator lives."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)

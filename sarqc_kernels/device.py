"""The GPU of a call, as far as kernels and their configurations need it: its architecture, and what can run on it.

Two questions that every operation has of Triton are answered here once: can it take these tensors
(`triton_unsupported`), and which implementation comes first where they lie (`fastest_first`). Nothing here imports
triton.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sarqc_kernels.backend import Implementation

__all__ = [
    "FUSED",
    "SHARED_BYTES",
    "Device",
    "device_info",
    "fastest_first",
    "interpreting",
    "on_device",
    "triton_unsupported",
]

SHARED_BYTES = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448,
                120: 101_376, 121: 101_376}  # fmt: skip
"""Shared memory that one program can have, by capability; a card not listed here counts as the least, 101 376."""

FUSED = {"enable_fp_fusion": True}
"""An option of Triton's launches: a product and the sum that takes it are rounded once. That is its default up to 3.9,
which warns that 3.10 has the other; so every launch says what it is compiled and counted with."""


@dataclass(frozen=True)
class Device:
    """What a choice of tiles may depend on. arch: capability times ten. multiprocessors: how many run at once."""

    arch: int
    multiprocessors: int

    @property
    def tensor_memory(self) -> bool:
        """Tensor cores keep sums in a memory of their own: sm_100 to sm_110."""
        return 100 <= self.arch < 120

    @property
    def sums_in_registers(self) -> bool:
        """Tensor cores take both operands and the sums from registers (mma.sync alone): before sm_90, and sm_120."""
        return self.arch < 90 or self.arch >= 120

    @property
    def operand_in_flight(self) -> bool:
        """A product that has been issued still reads its first operand from registers (wgmma): sm_90."""
        return self.arch == 90

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one program can have."""
        return SHARED_BYTES.get(self.arch, min(SHARED_BYTES.values()))


INTERPRETED = Device(arch=90, multiprocessors=4)
"""The card that the interpreter stands for: it takes tensor descriptors; few processors keep its launches small."""


def interpreting() -> bool:
    """TRITON_INTERPRET is set, so that kernels run in Triton's interpreter (if set before triton was imported)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def device_info(device: torch.device) -> Device:
    """The GPU behind a device; queries the driver once and never waits for the device."""
    return _cuda_device(device.index or 0) if device.type == "cuda" and not interpreting() else INTERPRETED


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """While it lasts, launches go to the card that holds `tensor`; Triton by itself launches on the current one."""
    elsewhere = tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else nullcontext()


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count)


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_unsupported(tensor: Tensor) -> str | None:
    """Why Triton cannot take tensors that lie where `tensor` does; None where it can."""
    if not _triton_is_installed():
        return "triton is not installed"
    if interpreting():
        return None
    if tensor.device.type == "cpu":
        return "tensors are on the CPU and TRITON_INTERPRET is not set"
    if tensor.device.type != "cuda" or torch.version.hip:
        return f"tensors are on {tensor.device.type}{' (ROCm)' if torch.version.hip else ''}, not on an NVIDIA card"
    arch = device_info(tensor.device).arch
    return None if arch >= 80 else f"the card has compute capability {arch / 10}, 8.0 or later is needed"


def fastest_first(implementations: Sequence[Implementation], tensor: Tensor) -> Sequence[Implementation]:
    """`implementations` in the order in which to try them where `tensor` lies.

    On a CPU: what is made for one, then the reference. Triton there means the interpreter, which runs on request and
    never by default.
    """
    if tensor.device.type != "cpu":
        return implementations
    rank = {"cpu": 0, "reference": 1}
    return sorted(implementations, key=lambda implementation: rank.get(implementation.name, 2))

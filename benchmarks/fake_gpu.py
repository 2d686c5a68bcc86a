"""A GPU that is not there: Triton compiles for it and launches nothing.

With it the package's own launch code runs on CPU tensors, so what is compiled is what a real launch specialises: sizes
that are 1 become constants, multiples of 16 are known as such. No result is right.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from sarqc_kernels import device
from sarqc_kernels.device import Device

__all__ = ["H200", "become"]

H200 = Device(90, 132)


class Utilities:
    """What Triton asks of a driver beside launches."""

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and threads of a kernel."""
        return 1, 1, 64, 0, 1024

    def get_device_properties(self, _: Any) -> dict[str, int]:
        """Of an H200."""
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65_536}

    def fill_tma_descriptor_tiled(self, *_: Any) -> int:
        """A descriptor that nobody reads."""
        return 0


class Launcher:
    """Launches nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> None:
        """Nothing."""


class Driver(DriverBase):
    """A GPU as far as compilation goes. Devices are numbered by capability: Triton keeps kernels by device."""

    launcher_cls = Launcher

    def __init__(self, gpu: Device) -> None:
        self.gpu = gpu
        self.utils = Utilities()

    @classmethod
    def is_active(cls) -> bool:
        """Always."""
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Nobody reads it."""
        return ty

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", self.gpu.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        """There is nothing to time."""
        raise NotImplementedError

    def get_current_device(self) -> int:
        """One for each capability."""
        return self.gpu.arch

    def get_current_stream(self, _: Any) -> int:
        """The only one."""
        return 0

    def set_current_device(self, _: Any) -> None:
        """Nothing: `become` does it."""


def become(gpu: Device) -> None:
    """From now on CPU tensors count as tensors of this GPU, for Triton and for the package's choice of tiles."""
    driver.set_active(Driver(gpu))
    device.INTERPRETED = gpu

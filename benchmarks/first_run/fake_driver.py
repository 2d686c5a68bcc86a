"""A pytest plugin: Triton compiles for a GPU that is not there and launches nothing.

With it the kernel tests compile every variant that a GPU's tests will ask for: the package's own launch code runs on
CPU tensors, so sizes that are 1 or multiples of 16 are specialised as a real launch would. No result is right, so every
test that looks at one fails; the exit status says nothing.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # where it is unset, the tests ask for the interpreter

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from benchmarks.first_run import portable
from sarqc_kernels import device
from tests.kernels import interpreter

GPU = device.Device(90, 132)


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
    """An H200 as far as compilation goes."""

    launcher_cls = Launcher

    def __init__(self) -> None:
        self.utils = Utilities()

    @classmethod
    def is_active(cls) -> bool:
        """Always."""
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Nobody reads it."""
        return ty

    def get_current_target(self) -> GPUTarget:
        """sm_90."""
        return GPUTarget("cuda", GPU.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        """There is nothing to time."""
        raise NotImplementedError

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, _: Any) -> int:
        """The only one."""
        return 0

    def set_current_device(self, _: Any) -> None:
        """There is one."""


def install() -> None:
    """What the package asks of a device is answered as on an H200."""
    portable.patch()
    driver.set_active(Driver())
    interpreter.prepare = lambda: "cpu"
    device.triton_unsupported = lambda tensor: None
    device.device_info = lambda device: GPU


install()  # now: conftest files ask which device there is before any hook of a plugin runs

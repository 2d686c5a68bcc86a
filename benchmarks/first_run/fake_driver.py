"""A pytest plugin: kernel tests run on a GPU that is not there (`benchmarks.fake_gpu`).

So they compile every variant that a GPU's tests will ask for. No result is right, so every test that looks at one
fails; the exit status says nothing.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # where it is unset, the tests ask for the interpreter

from benchmarks import fake_gpu
from benchmarks.first_run import portable
from sarqc_kernels import device
from tests.kernels import interpreter

portable.patch()
fake_gpu.become(fake_gpu.H200)  # now: conftest files ask which device there is before any hook of a plugin runs
interpreter.prepare = lambda: "cpu"
device.triton_unsupported = lambda tensor: None

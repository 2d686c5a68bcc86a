"""The same kernel tests hold every implementation, on a GPU or on a CPU through Triton's interpreter.

A test that takes `backend` runs once for each name in its module's `BACKENDS` (`("reference", "triton")` unless it
says otherwise), and is skipped with the reason where that implementation cannot run on this machine. Tensors go to
`device`. A process either interprets or compiles, so the choice is made here, before any test module imports triton.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from sarqc_kernels import build
from sarqc_kernels.device import device_info
from tests.kernels import interpreter

DEVICE = interpreter.prepare()


def unsupported_reason(backend: str) -> str | None:
    """The reason why no operation can run on this machine with `backend`; None where one can."""
    if backend == "cuda" and DEVICE != "cuda":
        return "no CUDA device"
    if backend == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        return build.unsupported_reason("columns", device_info(device).arch, device)
    if backend == "cpu" and DEVICE == "cuda":
        return "tensors are on a GPU"
    if backend in ("cuda", "triton") and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    own = any("backend" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "backend" not in metafunc.fixturenames or own:
        return
    names = getattr(metafunc.module, "BACKENDS", ("reference", "triton"))
    also = getattr(metafunc.module, "unsupported_reason", lambda name: None)  # what only this module's operation needs
    reasons = {name: unsupported_reason(name) or also(name) for name in names}
    marks = {name: [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else [] for name, reason in reasons.items()}
    metafunc.parametrize("backend", [pytest.param(name, marks=marks[name], id=name) for name in names])


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tensors of a kernel test lie: "cuda", or "cpu" with Triton's interpreter."""
    return DEVICE

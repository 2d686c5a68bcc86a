"""Choice of an implementation: order, wishes, reasons, and that an operation really asks at every call."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sarqc_kernels import ArgumentError, BackendError, fit_grid
from sarqc_kernels.backend import ENVIRONMENT, Implementation, explain, pick, takes_all


def only_even(number: int) -> str | None:
    return None if number % 2 == 0 else f"{number} is odd"


TABLE = (Implementation("triton", only_even, lambda n: ("triton", n)), Implementation("reference", takes_all, str))


@pytest.fixture(autouse=True)
def no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def test_takes_the_first_that_can() -> None:
    assert pick("op", TABLE, (2,)).name == "triton"
    assert pick("op", TABLE, (3,)).name == "reference"


def test_environment_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert pick("op", TABLE, (2,)).name == "reference"
    monkeypatch.setenv(ENVIRONMENT, "")
    assert pick("op", TABLE, (2,)).name == "triton"


def test_the_caller_outranks_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "triton")
    assert pick("op", TABLE, (3,), "reference").name == "reference"


def test_a_forced_backend_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="backend = 'triton' cannot run op: 3 is odd"):
        pick("op", TABLE, (3,), "triton")
    with pytest.raises(BackendError, match="not implemented there; use one of triton, reference"):
        pick("op", TABLE, (2,), "cuda")
    monkeypatch.setenv(ENVIRONMENT, "triton")
    with pytest.raises(BackendError, match=f"{ENVIRONMENT} = 'triton' cannot run op: 3 is odd"):
        pick("op", TABLE, (3,))


def test_unknown_names_are_argument_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="backend = 'fast' is not known: use one of cuda, triton, cpu, reference"):
        pick("op", TABLE, (2,), "fast")
    monkeypatch.setenv(ENVIRONMENT, "fast")
    with pytest.raises(ArgumentError, match=ENVIRONMENT):
        pick("op", TABLE, (2,))


def test_nobody_can() -> None:
    with pytest.raises(BackendError, match=r"no implementation of op takes this call.*triton: 3 is odd"):
        pick("op", TABLE[:1], (3,))


def test_explain_names_every_backend() -> None:
    assert explain("op", TABLE, (3,)) == [
        ("cuda", "op is not implemented there"), ("triton", "3 is odd"), ("cpu", "op is not implemented there"),
        ("reference", None),
    ]  # fmt: skip


def test_operations_dispatch_inside_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(1, 1, 8)
    options = {"bits": 4, "group_size": 8, "sym": True, "search": False, "scale_dtype": torch.float32}
    fit_grid(weight, None, **options, backend="reference")
    with pytest.raises(BackendError, match="fit_grid"):
        fit_grid(weight, None, **options, backend="cuda")
    monkeypatch.setenv(ENVIRONMENT, "cuda")
    with pytest.raises(BackendError, match=ENVIRONMENT):
        fit_grid(weight, None, **options)


def test_import_needs_torch_alone() -> None:
    code = (
        "import sys; sys.modules.update(triton=None, transformers=None, safetensors=None)\n"
        "import sarqc_kernels, sarqc_kernels.testing\n"
        "assert callable(sarqc_kernels.quantize_columns)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

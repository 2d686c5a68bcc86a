"""`sarqc doctor`: what it says of this machine, that its self-tests can fail, and the command around it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from sarqc.entrypoints import doctor
from sarqc_kernels import selftest
from sarqc_kernels.backend import ENVIRONMENT
from sarqc_kernels.columns import cpu_impl
from sarqc_kernels.gram import cpu_impl as amx
from sarqc_kernels.w4a16 import cuda

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """As a user's machine is: kernel tests ask for the interpreter, a self-test in it would take minutes."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def test_every_operation_has_one_implementation_that_runs_and_is_right():
    examination = doctor.examine()
    on_cpu = [verdict for verdict in examination["operations"] if verdict["device"] == "cpu"]
    assert examination["healthy"] and not any(verdict["failed"] for verdict in on_cpu)
    ops = {probe.op for probe in selftest.PROBES}
    assert {verdict["op"] for verdict in on_cpu if verdict["chosen"]} == ops
    for verdict in on_cpu:
        assert (verdict["reason"] is None) == (verdict["error"] is not None)
        assert verdict["error"] is None or verdict["error"] <= verdict["limit"]
    chosen = {verdict["op"]: verdict["backend"] for verdict in on_cpu if verdict["chosen"]}
    assert chosen["gram_accumulate_"] == ("reference" if amx.unsupported_reason() else "cpu")
    assert chosen["quantize_columns"] == ("reference" if cpu_impl.unsupported_reason() else "cpu")
    assert examination["versions"]["torch"] == torch.__version__
    assert all(count > 0 for count in examination["free"].values())
    json.dumps(examination, allow_nan=False)


def test_probes_cover_every_operation_of_the_kernels():
    from sarqc_kernels import columns, dequant, gram

    assert {probe.op for probe in selftest.PROBES} == {
        *gram.implementations(), *columns.implementations(), *dequant.implementations(), "w4a16_matmul",
        "w4a16_experts",
    }  # fmt: skip


def test_csrc_takes_the_few_rows_of_a_probe():
    """It takes 16 rows at most of two experts; layouts are those of a GPU's tensors."""
    for tokens, taken in ((selftest.FEW, True), (selftest.TOKENS, False)):
        x, offsets = selftest._rows(tokens)
        assert int(offsets[-1]) == tokens and int(offsets.diff().min()) > 0
        weight, _ = selftest._prepared(CPU, selftest.LAYOUTS["cuda"])
        routed = len(selftest._routing(tokens, CPU).tokens)
        reasons = [cuda.unsupported_product(x, weight, rows, grouped=True) for rows in (tokens, routed)]
        assert [reason is None for reason in reasons] == [taken, taken]
    assert {(probe.op, probe.case) for probe in selftest.PROBES if probe.case} == {
        ("w4a16_matmul", "few rows"), ("w4a16_experts", "few rows"),
    }  # fmt: skip


@pytest.mark.parametrize("probe", selftest.PROBES, ids=lambda probe: probe.op + probe.case)
def test_a_self_test_notices_a_wrong_implementation(probe, monkeypatch):
    """Every result is turned upside down on its way out of the operation."""
    rooms = (selftest.gram, selftest.columns, selftest.w4a16, selftest.dequant)
    name = "dequantize_fp8" if probe.op == "dequantize" else probe.op  # one operation behind two functions
    for room in rooms:
        if hasattr(room, name):
            right = getattr(room, name)

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        if out is None:
            args[0].mul_(-1)
            return None
        spoil = lambda part: 15 - part if part.dtype == torch.uint8 else -part  # noqa: E731
        return tuple(map(spoil, out)) if isinstance(out, tuple) else spoil(out)

    for room in rooms:
        if hasattr(room, name):
            monkeypatch.setattr(room, name, wrong)
    chosen = next(verdict for verdict in doctor.check_operation(probe, CPU) if verdict.chosen)
    assert chosen.failed is not None and "off by" in chosen.failed


class OutOfResources(Exception):
    """As Triton's, which is no RuntimeError."""


@pytest.mark.parametrize("kind", [RuntimeError, OutOfResources])
def test_an_implementation_that_raises_is_a_failure_with_its_words(kind, monkeypatch):
    probe = selftest.PROBES[0]

    def breaks(*args, **kwargs):
        raise kind("no kernel image\nis available")

    monkeypatch.setattr(selftest.gram, probe.op, breaks)
    chosen = next(verdict for verdict in doctor.check_operation(probe, CPU) if verdict.chosen)
    assert chosen.failed == f"{kind.__name__}: no kernel image is available"


def test_a_wish_decides_what_is_marked(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "reference")
    probe = next(probe for probe in selftest.PROBES if probe.op == "w4a16_matmul")
    assert [verdict.backend for verdict in doctor.check_operation(probe, CPU) if verdict.chosen] == ["reference"]
    monkeypatch.setenv(ENVIRONMENT, "cuda")
    assert not any(verdict.chosen for verdict in doctor.check_operation(probe, CPU))


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"compressed-tensors": "0.20.0", "transformers": "5.23.0"}, "asymmetric"),
        ({"triton": "3.9.0"}, "spills"),
        ({"torch": "2.9.1+cu126"}, "torch before 2.10"),
        ({"transformers": "5.9.0"}, "transformers before 5.15"),
    ],
)
def test_known_trouble_is_named(versions, words):
    assert any(words in warning for warning in doctor.warnings(versions))


def test_good_versions_are_not_warned_of(monkeypatch):
    good = {"torch": "2.11.0+cu130", "triton": "3.6.0", "transformers": "5.17.0", "compressed-tensors": "0.19.0",
            "numpy": "2.5.2"}  # fmt: skip
    assert doctor.warnings(good) == []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert len(doctor.warnings(good)) == 2  # the interpreter itself, and loops of triton 3.6 with this numpy


def test_the_command():
    run = subprocess.run([sys.executable, "-m", "sarqc", "doctor", "--json"], capture_output=True, text=True)
    content = json.loads(run.stdout)
    assert run.returncode == 0 and content["healthy"] and run.stderr == ""


def test_the_table_and_the_exit_code(monkeypatch, capsys):
    from sarqc.cli import app

    probe = next(probe for probe in selftest.PROBES if probe.op == "round_to_grid")
    bad = selftest.Probe(probe.op, probe.implementations, probe.arguments, lambda backend, device: 0.5, 0.0)
    monkeypatch.setattr(selftest, "PROBES", (bad, next(p for p in selftest.PROBES if p.op == "gram_finalize")))
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as ended:
        app(["doctor"])
    shown = capsys.readouterr().out
    assert ended.value.code == 1
    assert "FAILED: off by 0.5" in shown and "> reference" in shown and "a self-test failed" in shown
    assert "gram_finalize" in shown and "ok, off by" in shown
    assert torch.cuda.is_available() or "none: everything runs on the CPU" in shown

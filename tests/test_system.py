"""What this machine has: the memory that is this process's, and what several threads must not call first."""

from __future__ import annotations

import pytest
import torch

from sarqc import system
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.model import lazy_model
from sarqc.system import multiplies_bf16
from tests.support import tiny

GB = 1 << 30


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"memory.max": 2 * GB}, 2 * GB),
        ("0::/slurm/job_7/step\n", {"slurm/job_7/memory.max": GB, "slurm/job_7/step/memory.max": "max"}, GB),
        ("0::/a/b\n", {"a/memory.max": GB, "a/b/memory.max": 2 * GB}, GB),
        ("4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": GB}, GB),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": 1 << 62}, None),
        ("0::/\n", {}, None),
        ("", {"memory.max": GB}, None),
    ],
)
def test_the_least_limit_on_the_way_to_our_own_group_holds(tmp_path, monkeypatch, own, files, expected):
    (tmp_path / "own").write_text(own)
    for name, limit in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
    monkeypatch.setattr(system, "_OWN_GROUPS", tmp_path / "absent")
    whole = system.host_memory()
    monkeypatch.setattr(system, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(system, "_GROUPS", tmp_path / "groups")
    assert whole > 2 * GB and system.host_memory() == (expected or whole)


def test_each_function_is_called_alone_on_one_element(monkeypatch):
    seen = []
    monkeypatch.setattr(system, "FUNCTIONS", (seen.append,))
    system.warm_up_mkl.__wrapped__()
    assert [(one.numel(), one.dtype) for one in seen] == [(1, torch.float32), (1, torch.float64)]


def test_a_lazy_model_warms_them_up_before_it_computes(tmp_path, monkeypatch):
    folder = tiny.save("llama", tmp_path)
    calls = []
    monkeypatch.setattr(lazy_model, "warm_up_mkl", lambda: calls.append("warm up"))
    monkeypatch.setattr(lazy_model, "trace", lambda *_: calls.append("trace") or {})
    with open_checkpoint(folder) as checkpoint:
        lazy_model.LazyModel.from_folder(folder, checkpoint)
    assert calls == ["warm up", "trace"]


@pytest.mark.parametrize(("times", "fast"), [(1.4, False), (1.6, True)])
def test_bf16_is_fast_from_a_measured_margin_on(monkeypatch, times, fast):
    clock = [0.0]

    def product(x, _):
        clock[0] += times if x.dtype == torch.float32 else 1.0
        clock[0] += 9.0 * (len(slow) > 0 and slow.pop())

    slow = [True, True, False, True]  # what else this machine is doing delays some products
    monkeypatch.setattr(system.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch, "mm", product)
    assert multiplies_bf16.__wrapped__() is fast


@pytest.mark.parametrize(
    ("dtype", "stored", "expected"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float16, torch.float32),  # has bits that bf16 has not
        ("auto", torch.float32, torch.float32),
        ("float32", torch.bfloat16, torch.float32),
    ],
)
def test_a_cpu_calibrates_in_bf16_where_it_is_fast(monkeypatch, dtype, stored, expected):
    monkeypatch.setattr(system, "multiplies_bf16", lambda: True)
    assert system.calibration_dtype(dtype, torch.device("cpu"), stored) == expected
    monkeypatch.setattr(system, "multiplies_bf16", lambda: False)
    assert system.calibration_dtype(dtype, torch.device("cpu"), stored) == torch.float32

"""The first run on a GPU, tried on a CPU: parts that pass, fail, crash and hang; what stays on disk; the last lines."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks import records
from benchmarks.budget import Budget
from benchmarks.first_run import cache, command, portable
from benchmarks.first_run.command import Outcome, Part
from benchmarks.ops import OPS


def module(folder: Path, name: str, text: str) -> tuple[str, ...]:
    """A module that `portable` can run, by its name."""
    (folder / f"{name}.py").write_text(text)
    return (name,)


def test_no_part_takes_anything_from_the_others(tmp_path: Path) -> None:
    """One that fails, one that dies of a signal, one that hangs with a child, and one after them all."""
    hangs = "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
    todo = [
        Part("tests fail", module(tmp_path, "one", "print('why it failed')\nraise SystemExit(3)"), 1),
        Part("tests crash", module(tmp_path, "two", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"), 1),
        Part("hang", module(tmp_path, "three", hangs + "time.sleep(99)"), 1),
        Part("fine", (*module(tmp_path, "four", "import sys\nprint('minutes', sys.argv[1])"), "{}"), 1),
    ]
    began = time.monotonic()
    environment = {"PYTHONPATH": f"{tmp_path}:{command.ROOT}", "PATH": "/usr/bin:/bin"}
    result = command.run(todo, Budget(0.8), tmp_path / "out", environment)
    assert time.monotonic() - began < 48
    assert [each.status for each in result] == ["failed", "failed", "timed out", "passed"]
    assert "why it failed" in result[0].tail and "minutes" in result[3].tail
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [each["name"] for each in summary["outcomes"]] == [each.name for each in todo] and summary["to come"] == []
    lines = command.last_lines(result, tmp_path / "out")
    assert lines[0].startswith("1 of 4 parts passed, 0 numbers") and "hang: timed out" in lines[3]


def test_where_time_is_short_the_first_parts_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty parts of a minute: the share of each would be less than a part needs at least."""
    monkeypatch.setattr(command, "_outcome", lambda part, *given: Outcome(part.name, "passed", given[0], ""))
    clock = iter(range(0, 10_000, 3))
    budget = Budget(1.0, clock=lambda: float(next(clock)))
    result = command.run([Part(f"tests {i}", ("this",), 1) for i in range(20)], budget, tmp_path, {})
    statuses = [each.status for each in result]
    assert statuses[0] == "passed" and statuses[-1] == "left out" and statuses == sorted(statuses, reverse=True)


def test_what_has_no_time_is_said(tmp_path: Path) -> None:
    (result,) = command.run([Part("fine", ("this",), 1)], Budget(0.0), tmp_path, {})
    assert result.status == "left out"


def record(op: str, point: str, seconds: float, contender: str = "sarqc triton", **own) -> dict:
    return {"status": "timed", "op": op, "point": point, "contender": contender, "ours": True, "part": "whole",
            "seconds": {"p50": seconds}, "roof_seconds": 5e-6, "goal_share": None, "goal_seconds": None,
            **own}  # fmt: skip


def test_goals_that_are_missed_are_the_last_lines() -> None:
    """The best of ours counts; the farthest from its goal comes first; parts and rivals do not count."""
    values = [
        record("w4a16", "a", 30e-6, goal_share=0.5),
        record("w4a16", "a", 12e-6, "sarqc cuda", goal_share=0.5),
        record("w4a16", "b", 9e-6, goal_share=0.5),
        record("columns", "c", 9e-3, goal_seconds=6e-3),
        record("columns", "c", 1e-3, goal_seconds=6e-3, part="factor"),
        record("gram", "d", 9e-3),
        record("gram", "e", 9e-3, goal_share=0.5, ours=False),
    ]
    lines = command.missing(values)
    assert [line.split(":")[0] for line in lines] == ["columns c", "w4a16 a"]
    assert "12.0 us by sarqc cuda, 1.20 of the goal of 10.0 us" in lines[1]


def test_parts_are_tests_first_and_cover_every_operation(tmp_path: Path) -> None:
    result = command.parts(tmp_path, quick=True, device="cpu")
    names = [each.name for each in result]
    assert set(command.ORDER) == set(OPS) and all((command.ROOT / each.arguments[-1]).exists()
                                                  for each in result if each.name.startswith("tests "))  # fmt: skip
    first = next(at for at, name in enumerate(names) if not name.startswith("tests "))
    assert names[first:] == [*command.ORDER, "decode", "quantize"]


def test_a_run_on_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """One operation, from the command to its records."""
    every = command.parts
    monkeypatch.setattr(command, "parts", lambda *given: [each for each in every(*given) if each.name == "gram"])
    none = ["--cache", str(tmp_path / "none")]
    assert command.main(["--quick", "--device", "cpu", "--minutes", "4", "--out", str(tmp_path / "out"), *none]) == 0
    result = records.read(tmp_path / "out" / "records.jsonl")
    assert records.of_status(result, "timed") and {each["op"] for each in result} == {"gram"}
    assert (tmp_path / "out" / "summary.txt").read_text().startswith("1 of 1 parts passed")
    assert "1 of 1 parts passed" in capsys.readouterr().out


def test_only_what_a_launch_reads_is_packed(tmp_path: Path) -> None:
    import tarfile

    for name in ("triton/a/k.cubin", "triton/a/k.json", "triton/a/k.ttir", "sarqc/gemv.so"):
        path = tmp_path / "gpu-cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    size = cache.pack(tmp_path / "gpu-cache", tmp_path / "c.tar.gz")
    with tarfile.open(tmp_path / "c.tar.gz") as file:
        assert file.getnames() == ["gpu-cache/sarqc/gemv.so", "gpu-cache/triton/a/k.cubin", "gpu-cache/triton/a/k.json"]
    assert size == (tmp_path / "c.tar.gz").stat().st_size


def test_a_cache_that_was_carried_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own cache, which writes whole paths down."""
    cache_module = pytest.importorskip("triton.runtime.cache")
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "here"))
    manager = cache_module.FileCacheManager("key")
    manager.put_group("k.json", {"k.cubin": manager.put(b"code", "k.cubin"), "k.json": manager.put("{}", "k.json")})
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "there"))
    assert cache_module.FileCacheManager("key").get_group("k.json") == {}
    assert portable.relocate(tmp_path / "there") == 1
    assert set(cache_module.FileCacheManager("key").get_group("k.json")) == {"k.cubin", "k.json"}


def test_an_outcome_names_its_log(tmp_path: Path) -> None:
    lines = command.last_lines([Outcome("tests gram", "failed", 1.0, "")], tmp_path)
    assert str(tmp_path / "tests-gram.log") in lines[1]

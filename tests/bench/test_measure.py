"""The harness, with operations made for it: what is timed, what is listed instead, and that time is kept."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gate, records, timing
from benchmarks.budget import Budget
from benchmarks.measure import Settings, measure
from benchmarks.ops import OPS
from benchmarks.ops.base import Contender, Op, Point, Roof
from benchmarks.timing import Turn, copies_for, in_turns, percentiles

CPU = torch.device("cpu")
ROOF = Roof(bandwidth=1e9, flops=1e9)
FACTS: dict[str, Any] = dict.fromkeys(("device", "gpu", "driver", "clocks", "versions", "commit", "when"))
FACTS |= {"tested": True, "quick": True}


def contender(name: str, call=lambda: 0.0, **changes: Any) -> Contender:
    made = {"ours": True, "unsupported": lambda point, device: None, "bind": lambda inputs: call} | changes
    return Contender(name, **made)


def operation(*contenders: Contender, points: int = 1) -> Op:
    """An op whose result is its own error."""
    every = [Point(f"p{rank}", "made up", {"n": rank}, 1e3, 4e3, rank) for rank in reversed(range(points))]
    return Op("made-up", (), lambda quick: every, lambda *_: {}, contenders, lambda inputs, result: result, 0.5, "it")


def measured(op: Op, tmp_path: Path, budget: Budget | None = None) -> list[dict[str, Any]]:
    sink = records.Sink(tmp_path / "r.jsonl", FACTS)
    measure(op, Settings(CPU, True, 0.0), ROOF, budget or Budget(1.0), sink)
    return records.read(sink.path)


def test_every_contender_leaves_a_record_with_the_reason(tmp_path):
    def breaks():
        raise ValueError("no such thing\nsecond line")

    result = measured(
        operation(
            contender("right"),
            contender("absent", unsupported=lambda point, device: "it is not installed"),
            contender("wrong", lambda: 0.7),
            contender("not a number", lambda: float("nan")),
            contender("broken", breaks),
            contender("half", lambda: 9.0, part="half"),
        ),
        tmp_path,
    )
    status = {record["contender"]: record["status"] for record in result}
    assert status == {"right": "timed", "absent": "absent", "wrong": "wrong", "not a number": "wrong",
                      "broken": "failed", "half": "timed"}  # fmt: skip
    reasons = {record["contender"]: record.get("reason") for record in result}
    assert reasons["absent"] == "it is not installed" and reasons["broken"] == "ValueError: no such thing"
    assert "0.7 > 0.5" in reasons["wrong"]


def test_a_record_says_what_its_number_depends_on(tmp_path):
    calls: list[float] = []

    def slow():
        calls.append(time.perf_counter())
        time.sleep(0.002)
        return 0.25

    (record,) = measured(operation(contender("slow", slow)), tmp_path)
    assert record["seconds"]["p20"] <= record["seconds"]["p50"] <= record["seconds"]["p80"]
    assert record["seconds"]["p50"] >= 0.002 and record["error"] == 0.25 and record["how"] == "wall clock"
    # 4000 bytes at a gigabyte a second take longer than 1000 flops at as many a second
    assert record["bound"] == "memory" and record["roof_seconds"] == pytest.approx(4e-6)
    assert record["share"] == pytest.approx(4e-6 / record["seconds"]["p50"])
    assert len(calls) == 2 + record["rounds"]  # judged, warmed up, timed
    for field in (*records.COMMON, *records.TIMED):
        assert field in record


def test_points_come_by_rank_and_what_time_does_not_reach_is_listed(tmp_path):
    now = [0.0]

    def takes_ten_seconds():
        now[0] += 2.0  # judged, warmed up and three turns: five calls a point
        return 0.0

    budget = Budget(25 / 60, first_guess=1.0, clock=lambda: now[0])
    result = measured(operation(contender("c", takes_ten_seconds), points=4), tmp_path, budget)
    assert [(record["point"], record["status"]) for record in result] == [
        ("p0", "timed"), ("p1", "timed"), ("p2", "left out"), ("p3", "left out"),
    ]  # fmt: skip
    assert now[0] <= 25


def test_a_first_point_that_compiles_does_not_take_the_time_of_the_others():
    now = [0.0]
    budget = Budget(1.0, clock=lambda: now[0])
    lengths = iter((35.0, 3.0, 3.0, 3.0))
    taken = 0
    for length in lengths:
        if not budget.has_time():
            break
        with budget.step():
            now[0] += length
        taken += 1
    assert taken == 4 and now[0] <= 60


def test_contenders_take_turns():
    order: list[str] = []
    turns = {name: Turn(lambda name=name: order.append(name) or 0.001, 1, "x") for name in "abc"}
    in_turns(turns, 0.0)
    assert order == [*"abc"] * 3
    assert all(turn.samples == [0.001] * 3 for turn in turns.values())


def test_percentiles_and_copies():
    assert percentiles([5.0, 1.0, 3.0, 2.0, 4.0]) == pytest.approx({"p20": 1.8, "p50": 3.0, "p80": 4.2})
    assert copies_for(8.7e6) * 8.7e6 >= 200e6 and copies_for(1e12) == 1 and copies_for(1) == 64


def test_a_file_keeps_the_last_word_and_other_files_are_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    sink = records.Sink(path, FACTS)
    op = operation(contender("c"))
    point = op.points(True)[0]
    for reason in ("first", "second"):
        sink.add(records.untimed("absent", op, point, op.contenders[0], reason))
    assert [record["reason"] for record in records.read(path)] == ["second"]
    with pytest.raises(ValueError, match="no reason"):
        sink.add({"status": "absent", "op": "x"})
    assert len(path.read_text().splitlines()) == 2
    for text in ("{}", "nothing", json.dumps({"status": "timed", "op": "x"})):
        path.write_text(text + "\n")
        with pytest.raises(SystemExit, match=r"r\.jsonl:1 is no record"):
            records.read(path)


def test_the_gate_lets_through_what_passes_and_says_what_fails(tmp_path):
    good, bad, slow = (tmp_path / f"test_{name}.py" for name in ("good", "bad", "slow"))
    good.write_text("def test_it(): pass\n")
    bad.write_text("def test_it(): assert 1 == 2\n")
    slow.write_text("import time\ndef test_it(): time.sleep(600)\n")
    result = gate.verdicts({"good": [str(good)], "bad": [str(good), str(bad)]}, 300)
    assert result["good"] is None and "test_bad.py::test_it" in result["bad"]
    assert "did not end in time" in gate.verdicts({"slow": [str(slow)]}, 0.5)["slow"]


def test_every_op_has_its_tests_and_shapes_with_a_reason():
    for op in OPS.values():
        assert op.tests and all((gate.ROOT / path).is_file() for path in op.tests)
        for quick in (True, False):
            points = op.points(quick)
            assert len({point.name for point in points}) == len(points)
            assert all(point.why and point.flops > 0 and point.traffic > 0 for point in points)
        names = [contender.name for contender in op.contenders]
        assert len(set(names)) == len(names) and op.contenders[0].ours
        assert any(not contender.ours for contender in op.contenders)


def test_what_waits_for_the_device_is_not_captured(monkeypatch):
    """A capture that fails would spoil the next ones, so what a graph cannot hold is seen before."""
    modes, captured = ["default"], []

    def waits() -> None:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def capture(calls):
        captured.append(calls)
        return SimpleNamespace(replay=None)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "LEAST_CALLS", 1)
    monkeypatch.setattr(timing, "_on_stream", lambda calls: float(len([call() for call in calls])))
    monkeypatch.setattr(timing, "_captured", capture)
    card = torch.device("cuda")
    turn = timing.ready([lambda: None, waits], card)
    assert turn.how == "stream (called a synchronizing CUDA operation)" and not captured
    assert turn.run() == 2.0 and modes[-1] == "default"
    free = lambda: None  # noqa: E731
    assert timing.ready([free], card).how == "graph" and captured == [[free]]
    assert modes[-1] == "default"


def test_a_capture_that_fails_is_ended_for_the_allocator(monkeypatch):
    ended = []

    class Fails:
        def __init__(self, graph, pool):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    def end(device, pool):
        ended.append((device, pool))
        raise RuntimeError("not currently recording to mempool_id")  # a torch that has ended it

    fake = {"CUDAGraph": object, "graph_pool_handle": lambda: (0, 7), "graph": Fails, "current_device": lambda: 1}
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        timing._captured([lambda: None])
    assert ended == [(1, (0, 7))]

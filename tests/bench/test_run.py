"""The commands, from end to end on a CPU: quick runs, what they write, pictures of it, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import gate, machine, plot, records, run, tune
from benchmarks.decode import command as decode
from benchmarks.ops import OPS
from benchmarks.quantize import command as quantize
from benchmarks.quantize.shapes import MODELS, config_of, tensors_of
from benchmarks.quantize.source import RandomSource
from benchmarks.quantize.stopwatch import OpTimes
from sarqc.errors import ModelError
from sarqc_kernels import gram_accumulate_


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A quick run of every op in this process, tests skipped."""
    out = tmp_path_factory.mktemp("bench") / "cpu.jsonl"
    for op in OPS:
        assert run.main([op, "--quick", "--skip-tests", "--device", "cpu", "--out", str(out)]) == 0
    return out


def test_a_quick_run_times_the_references_and_lists_every_rival(results):
    result = records.read(results)
    for op in OPS.values():
        mine = [record for record in result if record["op"] == op.name]
        timed = records.of_status(mine, "timed")
        assert {record["status"] for record in mine} == {"timed", "absent"}
        assert {record["contender"] for record in mine} == {contender.name for contender in op.contenders}
        assert any(record["contender"] == "sarqc reference" for record in timed)
        assert all(record["error"] is None or record["error"] <= op.most_error for record in timed)
    assert all(record["gpu"] is None and record["device"] == "cpu" for record in result)  # never claims a GPU
    assert all(record["versions"]["torch"] == torch.__version__ for record in result)
    assert not any(record["tested"] for record in result) and all(record["quick"] for record in result)


def test_pictures_of_what_was_measured(results, tmp_path):
    plot.main([str(results), "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {f"cpu-{op}.png" for op in OPS}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.iterdir())
    with pytest.raises(SystemExit, match="is not there"):
        plot.main([str(tmp_path / "none.jsonl")])


def test_an_op_whose_tests_fail_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gate, "verdicts", lambda suites, seconds: dict.fromkeys(suites, "its tests fail: test_x"))
    out = tmp_path / "r.jsonl"
    assert run.main(["gram", "--quick", "--device", "cpu", "--out", str(out)]) == 1
    (record,) = records.read(out)
    assert (record["status"], record["op"], record["reason"]) == ("refused", "gram", "its tests fail: test_x")
    assert "gram is not timed" in capsys.readouterr().out


def test_what_a_benchmark_runs_first_needs_nothing_but_pytest():
    """NOTES promises it for a GPU machine: an import of more there ends in an error, and nothing is timed."""
    files = {file for op in (*OPS.values(), decode.OP) for file in op.tests} | {"tests/kernels/columns_cases.py"}
    wanted = re.compile(r"^(?:from|import) (hypothesis|xdist|pytest_benchmark|matplotlib|scipy)\b", re.MULTILINE)
    assert {file: wanted.findall((gate.ROOT / file).read_text()) for file in files} == {file: [] for file in files}


def test_no_time_no_points(tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    run.main(["w4a16", "--quick", "--skip-tests", "--device", "cpu", "--minutes", "0.001", "--out", str(out)])
    result = records.read(out)
    assert {record["status"] for record in result} == {"left out"} and len(result) == len(OPS["w4a16"].points(True))
    assert "left out" in capsys.readouterr().out


def test_a_run_on_a_cpu_never_writes_to_the_committed_results(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert machine.place(torch.device("cpu"), False).parent == tmp_path


def test_a_whole_run_by_its_parts(tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    assert quantize.main(["--quick", "--device", "cpu", "--out", str(out), "--folder", str(tmp_path)]) == 0
    dense, experts = records.of_status(records.read(out), "run")
    for record in (dense, experts):
        seconds = record["seconds"]
        assert record["blocks"] == record["layers"] == 4
        assert sum(seconds.values()) == pytest.approx(record["total_seconds"], rel=0.02)
        assert all(seconds[name] > 0 for name in ("load", "forward", "gram", "factor", "columns", "pack", "disk"))
        assert record["whole_model_seconds"] == pytest.approx(record["total_seconds"], rel=0.01)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []  # what was written is gone
    assert "4 of 4 blocks" in capsys.readouterr().out


def test_a_run_that_has_no_time_for_all_blocks_says_what_all_would_take(tmp_path):
    run_of_one = quantize.Run("small", 1, 1, 16, "rtn", 4, 32)
    sink = records.Sink(tmp_path / "r.jsonl", {**machine.facts(torch.device("cpu")), "tested": False, "quick": True})
    assert "1 of 4 blocks" in quantize.measure(run_of_one, torch.device("cpu"), tmp_path, quantize.Budget(5), sink)
    (record,) = records.read(sink.path)
    assert record["blocks"] == 1 and record["layers"] == 4
    assert record["total_seconds"] < record["whole_model_seconds"] < 5 * record["total_seconds"]


def test_a_run_that_is_ended_keeps_the_blocks_it_had(tmp_path, monkeypatch):
    written = []

    def write(result, *given):
        if written:
            raise KeyboardInterrupt
        written.append(result)

    monkeypatch.setattr(quantize, "_write", write)
    with pytest.raises(KeyboardInterrupt):
        quantize.main(
            ["--quick", "--method", "rtn", "--model", "small", "--device", "cpu", "--out", str(tmp_path / "r")]
        )
    (record,) = records.read(tmp_path / "r")
    assert record["blocks"] == 1 and record["whole_model_seconds"] > record["total_seconds"]


def test_a_model_that_no_time_is_left_for_leaves_no_record(tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    assert quantize.main(["--quick", "--device", "cpu", "--minutes", "0.001", "--out", str(out)]) == 0
    assert not out.exists() and "no time was left" in capsys.readouterr().out


def test_tensors_are_drawn_by_name():
    config = config_of("small-moe", 1)
    shapes = tensors_of(config)
    source, again = RandomSource(shapes), RandomSource(shapes)
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    first = source.load(name)
    assert torch.equal(first, again.load(name)) and tuple(first.shape) == source.shape(name) == (64, 128)
    assert not torch.equal(first, source.load(name.replace("3", "4")))
    assert float(first.float().std()) == pytest.approx(128**-0.5, rel=0.05)
    assert bool((source.load("model.norm.weight") == 1).all())
    assert not torch.equal(first, RandomSource(shapes, seed=1).load(name))
    with pytest.raises(ModelError, match="nothing"):
        source.load("nothing")


@pytest.mark.parametrize(("model", "billions"), [("llama-3-8b", 8.03), ("qwen3-30b-a3b", 30.5)])
def test_shapes_are_those_of_the_models(model, billions):
    count = sum(torch.Size(shape).numel() for shape in tensors_of(config_of(model, None)).values())
    assert count / 1e9 == pytest.approx(billions, rel=0.01)
    assert config_of(model, 2).num_hidden_layers == 2 and MODELS[model][1]["num_hidden_layers"] > 2


def test_operations_are_timed_wherever_they_are_called():
    with OpTimes(torch.device("cpu")) as times:
        x = torch.ones(3, 4)
        sums = torch.zeros(1, 4, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4)
        gram_accumulate_(*sums, x, None)
        torch.linalg.cholesky(torch.eye(3))
    assert sums[1].tolist() == [3] and float(sums[0][0, 0, 0]) == 3
    seconds = times.seconds()
    assert seconds["gram"] > 0 and seconds["factor"] > 0 and seconds["columns"] == 0


def test_tuning_keeps_what_beats_the_rule_and_nothing_else(monkeypatch, tmp_path):
    assert tune.best({tune.RULE: 1.0, "a": 0.99, "b": 1.2}) is None
    assert tune.best({tune.RULE: 1.0, "a": 0.9, "b": 0.8}) == "b"
    monkeypatch.setattr(tune, "table_path", lambda op, arch: tmp_path / "tuned" / f"{op}-{arch}.json")
    monkeypatch.setattr(tune, "choices", lambda op, arch: {"kept": {"tiles": "few rows"}, "gone": {"tiles": "x"}})
    made = dict.fromkeys(("gpu", "driver", "versions", "commit", "when"), "?")
    tune.write("columns", 90, {"new": {"tiles": "many rows"}, "gone": None}, made)
    table = json.loads((tmp_path / "tuned" / "columns-90.json").read_text())
    assert table["choices"] == {"kept": {"tiles": "few rows"}, "new": {"tiles": "many rows"}}
    monkeypatch.setattr(tune, "choices", lambda op, arch: {})
    tune.write("columns", 90, {"new": None}, made)
    assert not (tmp_path / "tuned" / "columns-90.json").exists()


def test_tuning_wants_a_card():
    with pytest.raises(SystemExit, match="nothing to tune"):
        tune.main(["gram", "--device", "cpu"])


def test_the_card_that_is_asked_for_is_the_current_one(monkeypatch):
    """Or its kernels would be timed by events, and captured in graphs, of the first."""
    made_current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    assert [machine.device_of(name) for name in ("cuda:2", "cpu")] == [torch.device("cuda:2"), torch.device("cpu")]
    assert made_current == [2]

"""Activations over the budget: another place, the same bytes, and nothing left behind on any way out."""

from __future__ import annotations

import errno
import json
import os
import random
from dataclasses import replace

import pytest
from rich.console import Console

import sarqc
from sarqc.cli.preflight import show
from sarqc.entrypoints.estimate import estimate
from sarqc.errors import ArgumentError, Interrupted, ResourceError
from sarqc.estimation import memory
from sarqc.pipeline.activation_store import PREFIX, FileStore
from sarqc.pipeline.offload import Offload
from sarqc.pipeline.resume import default_work
from tests.support import tiny
from tests.support.killing import contents, count_operations, in_child
from tests.support.ranks import in_ranks
from tests.support.stopping import Stopping

SMALL = {
    "num_samples": 4,
    "seqlen": 32,
    "group_size": 32,
    "micro_batch": 1,
    "reg_lambda": 0.3,
    "error_correction": False,
}
HELD = 4 * 32 * (64 + 4 * 64) * 4
KILLS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save("qwen3_moe", tmp_path_factory.mktemp("models") / "model", num_hidden_layers=3)


@pytest.fixture(scope="module")
def straight(source, tmp_path_factory):
    """The bytes of a run whose states were in memory."""
    out = tmp_path_factory.mktemp("straight") / "out"
    sarqc.quantize(source, out, **SMALL)
    return contents(out)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tensors here are tiny: whatever is over the budget is parked."""
    monkeypatch.setattr(Offload.__init__, "__defaults__", (1,))


@pytest.fixture
def files(monkeypatch):
    """Bytes that were put into files."""
    put, size = FileStore.put, []
    monkeypatch.setattr(FileStore, "put", lambda self, storage: size.append(storage.nbytes()) or put(self, storage))
    return size


@pytest.mark.parametrize("budget", [0, HELD, None])
def test_where_activations_are_makes_no_difference(source, straight, tmp_path, files, budget):
    sarqc.quantize(source, tmp_path / "out", activation_budget=budget, **SMALL)
    assert bool(files) == (budget == 0) and contents(tmp_path / "out") == straight
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("budgets", [(0, None), (None, 0), (0, 0)])
def test_a_stopped_run_goes_on_with_another_budget(source, straight, tmp_path, files, budgets):
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        sarqc.quantize(source, out, activation_budget=budgets[0], progress=Stopping(2), **SMALL)
    assert sorted(path.name for path in default_work(out).iterdir()) == [
        "blocks", "hidden.safetensors", "lock", "plan.json",
    ]  # fmt: skip
    sarqc.quantize(source, out, activation_budget=budgets[1], **SMALL)
    assert contents(out) == straight and files


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("budget", [0, HELD])
def test_the_reference_waits_in_a_file_too(tmp_path, files, kind, budget):
    """Also where the run was stopped in between."""
    source, run = tiny.save(kind, tmp_path / "model", num_hidden_layers=3), SMALL | {"error_correction": True}
    report = sarqc.quantize(source, tmp_path / "straight", **run).report
    assert files == [] and any(site["correction_share"] > 0 for site in report["sites"])
    with pytest.raises(Interrupted):
        sarqc.quantize(source, tmp_path / "stopped", activation_budget=budget, progress=Stopping(2), **run)
    for name in ("stopped", "at once"):
        sarqc.quantize(source, tmp_path / name, activation_budget=budget, **run)
        assert contents(tmp_path / name) == contents(tmp_path / "straight")
    assert files or budget


def test_kills_at_any_file_operation_lose_nothing(source, straight, tmp_path):
    run = dict(model=source, activation_budget=0, **SMALL)
    operations = count_operations(lambda: sarqc.quantize(out=tmp_path / "count", **run))
    chosen = random.Random(6)
    out, killed = tmp_path / "out", 0
    while killed < KILLS:
        code = in_child(lambda: sarqc.quantize(out=out, **run), kill_at=chosen.randint(1, operations))
        assert code in (0, -9)
        killed += code == -9
        if out.exists():
            break
    sarqc.quantize(out=out, overwrite=True, **run)
    assert contents(out) == straight
    assert sorted(path.name for path in tmp_path.iterdir()) == ["count", "out"]


def test_a_name_that_a_kill_left_is_swept_away(source, straight, tmp_path):
    """Where the system knows no files without a name, there is one for an instant."""
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        sarqc.quantize(source, out, progress=Stopping(1), **SMALL)
    (default_work(out) / f"{PREFIX}a1b2").touch()
    sarqc.quantize(source, out, **SMALL)
    assert contents(out) == straight


def test_a_disk_without_room_for_activations_is_one_line_and_no_loss(source, straight, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        sarqc.quantize(source, out, progress=Stopping(1), **SMALL)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match=r"activations \(No space left on device\).*--activation-budget"):
        sarqc.quantize(source, out, activation_budget=0, **SMALL)
    assert default_work(out).is_dir() and not out.exists()
    monkeypatch.undo()
    sarqc.quantize(source, out, activation_budget=0, **SMALL)
    assert contents(out) == straight


def test_ranks_keep_their_own_activations_in_files_of_their_own(source, straight, tmp_path):
    """Begun by four, finished by two."""
    out = tmp_path / "out"

    def stopped(rank):
        with pytest.raises(Interrupted):
            sarqc.quantize(source, out, ordered=True, activation_budget=0, progress=Stopping(1), **SMALL)

    assert in_ranks(4, stopped, tmp_path / "log") == [(0, "")] * 4
    ended = in_ranks(
        2, lambda _: sarqc.quantize(source, out, ordered=True, activation_budget=0, **SMALL), tmp_path / "log2"
    )
    assert ended == [(0, "")] * 2
    assert contents(out) == straight
    assert not default_work(out).exists() and len(list(tmp_path.iterdir())) == 3


# -- what is said before --------------------------------------------------------------------------------------------


def test_the_preflight_says_what_waits_and_where(source, tmp_path, capsys):
    inside = estimate(source, tmp_path / "out", **SMALL)
    outside = estimate(source, tmp_path / "out", activation_budget=1000, **SMALL)
    assert (inside.waiting.states, inside.waiting.mapped) == (HELD, 0)
    assert (outside.waiting.states, outside.waiting.mapped) == (1000, HELD - 1000)
    assert sum(one.needed for one in outside.disk) == sum(one.needed for one in inside.disk) + HELD - 1000
    assert outside.to_json()["waiting"]["mapped"] == HELD - 1000
    block = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 3
    assert 0.5 * block < inside.waiting.prefetched < block
    for result, place in ((inside, "in memory"), (outside, "in a file (over --activation-budget)")):
        show(Console(width=160), result)
        shown = " ".join(capsys.readouterr().out.split())
        assert f"of activations {place}" in shown and "the next block prefetched" in shown


def test_text_that_nobody_looks_at_waits_nowhere(source, tmp_path):
    preflight = estimate(source, tmp_path / "out", method="rtn", activation_budget=0)
    assert (preflight.waiting.states, preflight.waiting.mapped) == (0, 0) and preflight.waiting.prefetched > 0


def test_nothing_is_read_ahead_without_memory_for_it(source, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "peak_memory_mib", lambda: {"host": 100})  # it grows from test to test
    preflight = estimate(source, tmp_path / "out", **SMALL)
    peak = max(stage.host for stage in preflight.memory)
    monkeypatch.setattr(memory, "host_memory", lambda: peak)
    assert estimate(source, tmp_path / "out", **SMALL).waiting == preflight.waiting
    monkeypatch.setattr(memory, "host_memory", lambda: peak - 1)
    tight = estimate(source, tmp_path / "out", **SMALL)
    assert tight.waiting == replace(preflight.waiting, prefetched=0)
    assert max(stage.host for stage in tight.memory) < peak
    monkeypatch.setattr("sarqc.pipeline.driver.PrefetchingSource", None)  # whoever would use it fails
    sarqc.quantize(source, tmp_path / "out", **SMALL)
    assert contents(tmp_path / "out") == straight


def test_a_single_block_has_no_next_one(tmp_path):
    source = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    assert estimate(source, tmp_path / "out", **SMALL).waiting.prefetched == 0


def test_the_reference_beside_takes_its_part(tmp_path):
    source, options = tiny.save("llama", tmp_path / "model"), SMALL | {"error_correction": True}
    assert estimate(source, tmp_path / "out", **options).waiting.states == 4 * 32 * (128 + 6 * 64) * 4


def test_a_budget_below_nothing_is_refused(source, tmp_path):
    with pytest.raises(ArgumentError, match=r"activation_budget = -1"):
        estimate(source, tmp_path / "out", activation_budget=-1, **SMALL)


def test_the_command_line_takes_gigabytes(source, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from sarqc.cli import app

    options = [
        "--num-samples",
        "4",
        "--seqlen",
        "32",
        "--no-error-correction",
        "--dry-run",
        "--json",
        "--activation-budget",
    ]
    for given, mapped in (("0", HELD), ("1e-3", 0)):
        done = CliRunner().invoke(app, ["quantize", str(source), "-o", str(tmp_path / "out"), *options, given])
        assert done.exit_code == 0 and json.loads(done.stdout)["waiting"]["mapped"] == mapped

"""A run that is killed goes on, and what it writes in the end is what a run that nobody killed writes."""

from __future__ import annotations

import random

import pytest

import sarqc
from sarqc.pipeline.resume import default_work
from tests.support import tiny
from tests.support.killing import KILLS, contents, count_operations, in_child, kill_again_and_again, leftovers

SETTINGS = {"num_samples": 2, "seqlen": 32, "group_size": 32}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A model, the bytes that a straight run makes of it, and how many file operations that takes."""
    folder = tmp_path_factory.mktemp("models")
    source = tiny.save("qwen3_moe", folder / "model", num_hidden_layers=3)
    run = {"model": source, **SETTINGS}
    sarqc.quantize(**run, out=folder / "warm")
    operations = count_operations(lambda: sarqc.quantize(**run, out=folder / "out"))
    assert operations > 100
    return run, contents(folder / "out"), operations


@pytest.mark.fault("SIGKILL before a file operation")
def test_kills_at_any_file_operation_lose_nothing(straight, tmp_path, outcomes):
    run, expected, operations = straight
    chosen = random.Random(f"kills {sorted(expected)}")
    moment = lambda: {"kill_at": chosen.randint(1, operations)}  # noqa: E731
    kill_again_and_again(run, expected, tmp_path, outcomes, KILLS // 2, moment)


@pytest.mark.fault("SIGKILL at a random time")
def test_kills_at_any_time_lose_nothing(straight, tmp_path, outcomes):
    run, expected, _ = straight
    chosen = random.Random(1)
    moment = lambda: {"kill_after": chosen.uniform(0.0, 1.0)}  # noqa: E731
    kill_again_and_again(run, expected, tmp_path, outcomes, KILLS - KILLS // 2, moment)


@pytest.mark.fault("SIGKILL while an old output is replaced")
def test_a_kill_while_an_old_output_is_replaced_leaves_the_old_or_the_new_one(straight, tmp_path, outcomes):
    """The last operations are the ones that move folders: every one of them, from the back."""
    run, expected, operations = straight
    out = tmp_path / "out"
    old = {"config.json": b"{}"}
    for back in (2, 9, 16):
        out.mkdir()
        (out / "config.json").write_bytes(old["config.json"])
        code = in_child(lambda: sarqc.quantize(**run, out=out, overwrite=True), kill_at=operations - back)
        assert code == -9
        if out.exists():
            assert contents(out) in (old, expected)
        sarqc.quantize(**run, out=out, overwrite=True)
        outcomes.recovered(contents(out), expected)
        assert leftovers(tmp_path) == []
        for path in out.iterdir():
            path.unlink()
        out.rmdir()


def test_the_work_folder_is_always_one_that_goes_on(straight, tmp_path):
    run, expected, operations = straight
    out = tmp_path / "out"
    assert in_child(lambda: sarqc.quantize(**run, out=out), kill_at=operations * 3 // 4) == -9
    assert not out.exists()
    assert leftovers(tmp_path)[0].startswith(".out")
    assert default_work(out).is_dir()
    sarqc.quantize(**run, out=out)
    assert contents(out) == expected

"""A rank that is stuck ends all; one that is merely slow, or that was asleep itself, ends nobody."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

import sarqc
from sarqc.pipeline import quantize_site, watchdog
from sarqc.pipeline.resume import default_work
from sarqc.pipeline.watchdog import Heartbeat, Watch
from tests.support import tiny
from tests.support.ranks import in_ranks

SMALL = {"num_samples": 4, "seqlen": 32, "group_size": 32, "micro_batch": 1, "reg_lambda": 0.3, "ordered": True}


class Dict:
    """A store as a dict."""

    def __init__(self):
        self.kept = {}

    def add(self, key, amount):
        self.kept[key] = self.kept.get(key, 0) + amount
        return self.kept[key]

    def set(self, key, value):
        self.kept[key] = value

    def get(self, key):
        return self.kept[key].encode()


@pytest.fixture
def hearts():
    store = Dict()
    return [Heartbeat(store, rank, 3) for rank in range(3)]


def test_all_beat(hearts):
    watch = Watch(hearts[0], 3)
    for _ in range(20):
        for heartbeat in hearts:
            heartbeat.beat()
        assert watch.look() is None


def test_one_falls_silent_and_is_named(hearts):
    watch = Watch(hearts[0], 3)
    items = []
    for turn in range(8):
        for heartbeat in hearts:
            if turn < 4 or heartbeat.rank != 2:
                heartbeat.beat()
        items.append(watch.look())
    # Rank 0 beats first, so that it hears the last beat of turn 3 in turn 4: silent in turns 5, 6 and 7.
    assert items[:7] == [None] * 7
    assert items[7].startswith(f"rank 2 (process {os.getpid()} on ") and items[7].endswith("has given no sign of life")


def test_one_that_never_came(hearts):
    watch = Watch(hearts[0], 3)
    items = []
    for _ in range(4):
        hearts[0].beat()
        items.append(watch.look())
    assert items == [None] * 3 + ["rank 1 (which never began) and 1 more has given no sign of life"]


def test_a_store_that_does_not_answer_is_told_apart(hearts):
    watch = Watch(hearts[0], 2)
    for heartbeat in (*hearts, hearts[0]):
        heartbeat.beat()
    assert [watch.look(), watch.look()] == [None, None]
    assert "the process that keeps the ranks together" in watch.look()


def test_who_slept_blames_nobody(hearts):
    """Silence is counted in own rounds: there is none between two looks, however long a rank was stopped."""
    watch = Watch(hearts[0], 2)
    for heartbeat in hearts:
        heartbeat.beat()
    assert watch.look() is None
    for _ in range(100):  # rank 0 sleeps
        hearts[1].beat()
        hearts[2].beat()
    assert watch.look() is None
    hearts[0].beat()
    assert watch.look() is None


@pytest.fixture
def quick(monkeypatch):
    """Ranks are forked from here, and take these numbers along."""
    monkeypatch.setattr(watchdog, "BEAT", 0.1)
    monkeypatch.setattr(watchdog, "WATCHDOG_TIMEOUT", 3.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def straight(source, tmp_path_factory):
    return sarqc.quantize(source, tmp_path_factory.mktemp("out") / "out", **SMALL).out


def weights(out):
    return (out / "model.safetensors").read_bytes()


def in_the_second_block(who, what):
    """Have rank `who` do `what` before it solves anything in the second block."""
    solve_site, left = quantize_site.solve_site, [1]

    def solve(name, *args, **options):
        if left and int(os.environ["RANK"]) == who and "layers.1." in name:
            left.clear()
            what()
        return solve_site(name, *args, **options)

    setattr(quantize_site, "solve_site", solve)  # noqa: B010 - of this rank, a forked child, alone


@pytest.mark.fault("a rank that is stopped and hangs")
@pytest.mark.parametrize(
    ("stuck", "message"),
    [(1, "rank 1 (process "), (0, "the process that keeps the ranks together (torchrun's, or rank 0)")],
)
def test_a_rank_that_is_stopped_ends_the_others(source, straight, quick, tmp_path, stuck, message, outcomes):
    """Stopped as by SIGSTOP: it lives, keeps its connections and does nothing. Rank 0 keeps the store, too."""
    out, other = tmp_path / "out", 1 - stuck

    def stopping(rank):
        os.dup2(os.open(tmp_path / f"stderr {rank}", os.O_WRONLY | os.O_CREAT), 2)
        in_the_second_block(stuck, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        sarqc.quantize(source, out, **SMALL)

    ended = in_ranks(2, stopping, tmp_path / "log", seconds=40)
    assert (ended[other][0], ended[stuck][0]) == (2, -signal.SIGKILL), ended
    [line] = [one for one in (tmp_path / f"stderr {other}").read_text().splitlines() if one.startswith("sarqc: ")]
    assert line.startswith(f"sarqc: rank {other} of 2: {message}") and "for 3 seconds" in line and "last block" in line
    assert not out.exists() and default_work(out).exists()
    sarqc.quantize(source, out, **SMALL)
    outcomes.recovered(weights(out), weights(straight))
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]


def test_a_rank_that_is_slow_is_waited_for(source, straight, quick, tmp_path):
    """Twice as long as silence may last; like a solver, it works outside of Python."""
    out = tmp_path / "out"

    def slow(rank):
        in_the_second_block(1, lambda: time.sleep(6))
        sarqc.quantize(source, out, **SMALL)

    assert in_ranks(2, slow, tmp_path / "log") == [(0, "")] * 2
    assert weights(out) == weights(straight)


def test_work_in_torch_lets_the_heart_beat(quick):
    """One long call of torch, as a factorisation is, in the main thread; a second thread must run meanwhile."""
    store, matrix = Dict(), torch.eye(256).repeat(64, 1, 1)
    with watchdog.heartbeats(store, 0, 1):
        began = time.monotonic()
        while time.monotonic() - began < 1:
            torch.linalg.cholesky(matrix)
        beats = store.kept["sarqc beat 0"]
    assert beats >= 3

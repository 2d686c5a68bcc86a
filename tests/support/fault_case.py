"""A small run to put faults into, and what it has to end in."""

from __future__ import annotations

from collections import namedtuple

import pytest

import sarqc
from sarqc.entrypoints.verify import verify
from tests.support import tiny

SMALL = {
    "num_samples": 4,
    "seqlen": 64,
    "group_size": 32,
    "reg_lambda": 0.3,
    "error_correction": False,
}  # one fold, one micro-batch
Case = namedtuple("Case", "source out expected patch outcomes")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    source = tiny.save("qwen3_moe", folder / "model", num_hidden_layers=3)
    sarqc.quantize(source, folder / "out", **SMALL)
    return source, weights(folder / "out")


@pytest.fixture
def case(undisturbed, tmp_path, monkeypatch, outcomes):
    return Case(undisturbed[0], tmp_path / "out", undisturbed[1], monkeypatch, outcomes)


def weights(out):
    return (out / "model.safetensors").read_bytes()


def recovered(case):
    """The same command, undisturbed, ends where a run without a fault would have ended."""
    case.patch.undo()
    sarqc.quantize(case.source, case.out, **SMALL)
    assert [path.name for path in case.out.parent.iterdir()] == ["out"]
    case.outcomes.recovered(weights(case.out), case.expected)


def went_on(case):
    """A run that took what it was given ended in a checkpoint, whole and near its model, and left nothing behind."""
    assert [path.name for path in case.out.parent.iterdir()] == ["out"]
    case.outcomes.recovered(verify(case.out, against=case.source).problems, [])

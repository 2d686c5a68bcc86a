"""NOTES.md predicts what the shapes say."""

from benchmarks.gate import ROOT
from benchmarks.ops.__main__ import table


def test_the_predictions_are_those_of_the_shapes():
    assert table() in (ROOT / "benchmarks" / "NOTES.md").read_text(encoding="utf-8")

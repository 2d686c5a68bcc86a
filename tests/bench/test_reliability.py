"""The reliability table has every fault that a test tries, each of one kind, and nothing that nobody saw."""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import reliability
from sarqc.errors import ArgumentError
from tests.support.faults import CLEAR, RECOVERED, VALID, Outcomes

TESTS = Path(__file__).parent.parent
ROWS = json.loads(reliability.OUT.read_text(encoding="utf-8"))


def marked() -> set[str]:
    """Names of the faults that tests say they try."""
    names = set()
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                [name] = node.args
                assert isinstance(name, ast.Constant) and not node.keywords, f"{path}:{node.lineno}"
                names.add(str(name.value))
    return names


def test_every_fault_has_a_committed_result():
    assert sorted(marked()) == [row["fault"] for row in ROWS]
    assert all(row["tried"] > 0 and row["tried"] == sum(row[end] for end in reliability.ENDS) for row in ROWS)
    assert sum(row["lost data"] for row in ROWS) == 0
    kills = [row["tried"] for row in ROWS if row["fault"].startswith("SIGKILL")]
    assert sum(kills) >= 60


def report(nodeid, passed=True, **outcomes):
    return SimpleNamespace(
        nodeid=nodeid, when="call", passed=passed, failed=not passed, skipped=False,
        user_properties=[("outcomes", Counter(outcomes))],
    )  # fmt: skip


def test_trials_are_counted_by_what_they_ended_in_and_a_failed_test_as_lost():
    faults = reliability.Faults(marks={"a": "x", "b": "x", "c": "y"})
    faults.pytest_runtest_logreport(report("a", **{"clear error": 3, "recovered run": 1}))
    faults.pytest_runtest_logreport(report("b", passed=False, **{"clear error": 2}))
    faults.pytest_runtest_logreport(report("c", **{"recovered run": 7}))
    faults.pytest_runtest_logreport(report("unmarked", **{"recovered run": 9}))
    ends = {row["fault"]: [row[key] for key in ("tried", *reliability.ENDS)] for row in faults.rows()}
    assert ends == {"x": [7, 5, 1, 0, 1], "y": [7, 0, 7, 0, 0]}
    assert (
        reliability.table(faults.rows()).splitlines()[-1] == "| **all** | **14** | **5** | **8** | **none** | **1** |"
    )
    assert "2 kinds of faults were tried 14 times" in reliability.sentence(faults.rows())
    assert "5 ended in a clear error, 8 in a run" in reliability.sentence(faults.rows())
    assert reliability.sentence(faults.rows()).endswith("1 lost data.")


def test_outcomes_look_before_they_count():
    outcomes = Outcomes()
    for wrong in (KeyError("x"), "two\nlines", "\x1b[31m", "", "Traceback (most recent call last)"):
        with pytest.raises(AssertionError):
            outcomes.clear_error(wrong)
    with pytest.raises(AssertionError, match="data was lost"):
        outcomes.recovered(b"a", b"b")
    assert not outcomes.counts
    outcomes.clear_error(ArgumentError("bits = 1"))
    outcomes.recovered(b"a", b"a", trials=2)
    outcomes.still_valid()
    assert outcomes.counts == {CLEAR: 1, RECOVERED: 2, VALID: 1}

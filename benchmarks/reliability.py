"""Which faults were tried and how they ended: runs the tests marked `fault` and writes what they found.

    python -m benchmarks.reliability [--out benchmarks/results/reliability.json] [pytest arguments]

A test says what it tries and how that must end, `@pytest.mark.fault("a truncated shard", outcome="clear error")`, and
how often through `record_property("trials", n)`, once by default. A fault whose test fails is counted as "lost": it
ended in something else than a clear error or a recovered run. A test that was skipped tried nothing and is not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

OUT = Path(__file__).parent / "results" / "reliability.json"


@dataclass(eq=False)  # pytest keeps its plugins in a set
class Faults:
    """A pytest plugin that collects them. tried: (fault, outcome) -> [trials, of which lost]."""

    marks: dict[str, tuple[str, str]] = field(default_factory=dict)
    tried: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Remember what each test tries."""
        for item in items:
            if (mark := item.get_closest_marker("fault")) is not None:
                self.marks[item.nodeid] = (mark.args[0], mark.kwargs["outcome"])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test that ended; an error while it was set up counts as lost too."""
        if report.nodeid not in self.marks or report.skipped or (report.when != "call" and report.passed):
            return
        counts = self.tried.setdefault(self.marks[report.nodeid], [0, 0])
        trials = int(dict(report.user_properties).get("trials", 1))
        counts[0] += trials
        counts[1] += trials if report.failed else 0

    def rows(self) -> list[dict[str, Any]]:
        """One record for each fault, sorted."""
        return [
            {"fault": fault, "outcome": outcome, "trials": trials, "lost": lost}
            for (fault, outcome), (trials, lost) in sorted(self.tried.items())
        ]


def table(rows: list[dict[str, Any]]) -> str:
    """The records as a table in Markdown."""
    lines = ["| fault | tried | ended in | otherwise |", "| --- | ---: | --- | ---: |"]
    lines += [f"| {row['fault']} | {row['trials']} | {row['outcome']} | {row['lost'] or 'none'} |" for row in rows]
    total, lost = sum(row["trials"] for row in rows), sum(row["lost"] for row in rows)
    return "\n".join([*lines, f"| **all** | **{total}** | | **{lost or 'none'}** |"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    options, rest = parser.parse_known_args()
    faults = Faults()
    code = int(pytest.main(["-m", "fault", "-p", "no:xdist", "-o", "addopts=-q --strict-markers", *rest], [faults]))
    rows = faults.rows()
    if not rows:
        print("no test is marked as a fault", file=sys.stderr)
        return 2
    options.out.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))
    return code


if __name__ == "__main__":
    sys.exit(main())

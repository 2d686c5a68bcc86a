"""Which faults were tried and how they ended: runs the tests marked `fault` and writes what they saw.

    SARQC_KILLS=60 python -m benchmarks.reliability [--out benchmarks/results/reliability.json] [pytest arguments]

A test says what it tries, `@pytest.mark.fault("a truncated shard")`, and tells the fixture `outcomes` what each trial
ended in, where it looked (tests/support/faults.py). A test that fails saw one of its trials end in something else: that
one is counted as lost. A test that was skipped tried nothing, and is named on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

OUT = Path(__file__).parent / "results" / "reliability.json"
ENDS = ("clear error", "recovered run", "still valid", "lost data")
LOST = ENDS[-1]


@dataclass(eq=False)  # pytest keeps its plugins in a set
class Faults:
    """A pytest plugin that collects them. tried: fault -> trials by what they ended in."""

    marks: dict[str, str] = field(default_factory=dict)
    tried: dict[str, Counter[str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Remember what each test tries."""
        for item in items:
            if (mark := item.get_closest_marker("fault")) is not None:
                self.marks[item.nodeid] = mark.args[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test that ended; an error while it was set up counts as lost too."""
        if report.nodeid not in self.marks or (report.when != "call" and report.passed):
            return
        if report.skipped:
            self.skipped.append(report.nodeid)
            return
        counts = self.tried.setdefault(self.marks[report.nodeid], Counter())
        if report.when == "call":
            counts.update(dict(report.user_properties).get("outcomes", {}))
        counts[LOST] += report.failed

    def rows(self) -> list[dict[str, Any]]:
        """One record for each fault, sorted."""
        return [
            {"fault": fault, "tried": counts.total()} | {end: counts[end] for end in ENDS}
            for fault, counts in sorted(self.tried.items())
        ]


def sentence(rows: Sequence[dict[str, Any]]) -> str:
    """The records in a sentence."""
    clear, recovered, valid, lost = (sum(row[end] for row in rows) for end in ENDS)
    tried = sum(row["tried"] for row in rows)
    return (
        f"{len(rows)} kinds of faults were tried {tried} times: kills, full disks and devices, flipped bits, "
        "cut shards, hostile files, ranks that die. "
        f"{clear} ended in a clear error, {recovered} in a run that recovered, {valid} in a checkpoint that is still "
        f"valid; {lost or 'none'} lost data."
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The records as a table in Markdown, with their sum."""
    lines = [f"| fault | tried | {' | '.join(ENDS)} |", "| --- |" + " ---: |" * (1 + len(ENDS))]
    columns = ("tried", *ENDS)
    for row in rows:
        lines.append(_line(row["fault"], [str(row[key] or "") for key in columns]))
    total = [sum(row[key] for row in rows) for key in columns]
    return "\n".join([*lines, _line("**all**", [f"**{count or 'none'}**" for count in total])])


def _line(first: str, cells: Sequence[str]) -> str:
    return f"| {first} | {' | '.join(cells)} |"


def main() -> int:
    """Exit code of pytest; 2 where no test is marked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    options, rest = parser.parse_known_args()
    faults = Faults()
    code = int(pytest.main(["-m", "fault", "-p", "no:xdist", "-o", "addopts=-q --strict-markers", *rest], [faults]))
    rows = faults.rows()
    if not rows:
        print("no test is marked as a fault", file=sys.stderr)
        return 2
    for test in faults.skipped:
        print(f"skipped, not counted: {test}", file=sys.stderr)
    options.out.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))
    return code


if __name__ == "__main__":
    sys.exit(main())

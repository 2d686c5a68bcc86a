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
KINDS = {
    "killed at any moment": ("SIGKILL at a random time", "SIGKILL at a random time, real weights",
        "SIGKILL before a file operation", "SIGKILL while a kept run is exported",
        "SIGKILL while an old output is replaced"),
    "Ctrl-C": ("Ctrl-C once", "Ctrl-C twice"),
    "a disk that is full or fills up": ("a disk too small from the start", "a file size limit of the operating system",
        "a full disk while a block is saved", "a full disk while hidden states are saved",
        "a full disk while the checkpoint is written", "a full disk while the plan is written",
        "a tmpfs of 16 MB that fills up"),
    "a device out of memory": ("device out of memory on one of two ranks", "device out of memory while observing",
        "device out of memory while replaying", "device out of memory while solving many experts",
        "device too small for one window and one Gram"),
    "NaN, overflow, matrices without a factor, experts without a token": ("NaN in a tensor outside the blocks",
        "NaN in over 1 % of the rows of activations", "NaN in the weights of one expert of one layer",
        "NaN in under 1 % of the rows of activations", "a Gram that is not positive definite",
        "a Gram that no damping makes positive definite", "one expert of one layer whose outputs overflow",
        "text of one token: singular Grams, experts without tokens"),
    "a rank that dies, hangs or sees something else": ("a rank that fails or is killed",
        "a rank that is stopped and hangs", "ranks that see different texts"),
    "a work folder or model changed under a run": ("a damaged or lost file of the work folder",
        "a damaged plan of the work folder", "a model truncated between two parts of a run",
        "a run that goes on with another setting", "a work folder with somebody's files in it",
        "two runs at once in one work folder"),
    "a flipped bit": ("a flipped bit in a header", "a flipped bit in a tensor"),
    "shards cut anywhere, too long, missing": ("a missing shard", "a truncated shard",
        "bytes behind the end of a shard"),
    "mutated headers, indexes, configurations": ("a mutated header, index or config.json",),
    "hostile headers, indexes, links, code": ("a damaged or hostile header", "a link out of the folder",
        "a pickle in the weights' place", "a pipe in a file's place", "an index that points out of the folder",
        "an unusable index", "code that comes with a model"),
    "tensors missing, doubled, changed": ("a damaged manifest", "a missing, doubled or changed tensor",
        "a packer that writes something else", "a weight of the model that is in no file"),
    "config.json or tokenizer damaged, absurd, another's": ("a damaged tokenizer", "absurd numbers in config.json",
        "an unusable config.json", "the tokenizer of another model"),
    "no rights, nobody who reads the output": ("no right to write in a folder, or to read a file",
        "nobody reads what is printed, or its disk is full"),
}  # fmt: skip
"""What faults have in common, for a table of a dozen lines."""


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


def by_kind(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records summed up by `KINDS`; `ValueError` for a fault that is of none."""
    kinds = {fault: kind for kind, faults in KINDS.items() for fault in faults}
    if strange := [row["fault"] for row in rows if row["fault"] not in kinds]:
        raise ValueError(f"of no kind: {strange}; say in KINDS what they are")
    found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for row in rows:
        found[kinds[row["fault"]]].update({key: row[key] for key in ("tried", *ENDS)})
    return [{"fault": kind} | {key: counts[key] for key in ("tried", *ENDS)} for kind, counts in found.items()]


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

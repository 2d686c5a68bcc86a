"""`python -m benchmarks.models run|dry|page`: the sweep, its dry runs alone, and its page in the documentation."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.models import page, rows, run

RESULTS = Path(__file__).parents[1] / "results" / "models.json"


def main() -> None:
    """Run the selected rows, compare their dry runs with the results, or write docs/models.md and sarqc/models.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=main.__doc__)
    parser.add_argument("what", choices=("run", "dry", "page"))
    parser.add_argument("--only", default="", help="rows, with commas between them; by default all")
    parser.add_argument("--first", action="store_true", help="the most used models and the published conditions")
    parser.add_argument("--method", default="", help="instead of the default method")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are kept; rows that it has are kept")
    parser.add_argument("--again", action="store_true", help="run rows that have a result too")
    asked = parser.parse_args()
    if asked.what == "page":
        page.write(json.loads(asked.out.read_text()))
        return
    wanted = asked.only.split(",") if asked.only else rows.FIRST + rows.CONDITIONS if asked.first else rows.rows()
    if asked.what == "dry":
        run.dry(wanted, asked.out)
        return
    run.sweep(wanted, asked.out, asked.method, again=asked.again)


main()

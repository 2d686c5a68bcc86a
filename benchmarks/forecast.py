"""How far the forecast of a run's time is from the run: both, one after the other, for each model.

    python -m benchmarks.forecast results.json MODEL TEXT [MODEL TEXT ...] [--num-samples 16] [--seqlen 512]

The default method at 4 bits. The forecast measures this machine's rates for about a second and counts operations
(`sarqc.estimation.seconds`); the run's seconds are those of its report, stage by stage. Keep the machine quiet. Runs
are added to those of a results file that exists. `tests.support.large.save(Path("mixture-8.4GB"))` makes the large
model, which is measured with --num-samples 4 --seqlen 64 and the text "builtin".
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import sarqc
from benchmarks.machine import device_of, facts


def measured(model: str, text: str, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each stage as forecast and as spent, and the ratio of the sums."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        forecast = sarqc.estimate(model, out, dataset=text, **options).time
        spent = sarqc.quantize(model, out, dataset=text, **options).report["seconds"]
    stages = {name: [round(seconds, 2), spent.get(name, 0.0)] for name, seconds in forecast.seconds.items()}
    return {
        "model": Path(model).name,
        **options,
        "forecast, run": [round(forecast.total, 2), spent["total"]],
        "run / forecast": round(spent["total"] / forecast.total, 2),
        "stages: forecast, run": stages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("models", nargs="+", metavar="MODEL TEXT")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    args = parser.parse_args()
    options = {"num_samples": args.num_samples, "seqlen": args.seqlen, "group_size": 64}
    record: dict[str, Any] = {"machine": facts(device_of("cpu")), "cpus": os.cpu_count(), "runs": []}
    if args.results.exists():
        record["runs"] = json.loads(args.results.read_text(encoding="utf-8"))["runs"]
    for model, text in zip(args.models[::2], args.models[1::2], strict=True):
        record["runs"].append(measured(model, text, options))
        args.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(record["runs"][-1]), flush=True)


if __name__ == "__main__":
    main()

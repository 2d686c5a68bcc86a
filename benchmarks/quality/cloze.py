"""Answers instead of perplexity: the last word of each paragraph, asked through lm-eval (`sarqc.model.lm_eval`).

    python -m benchmarks.quality.cloze RESULTS.json --text TEXT.txt --text builtin NAME=MODEL [NAME=MODEL ...]

A model may be a checkpoint of any tool. Needs `pip install 'sarqc[eval]'`. What RESULTS.json holds already is not asked
again. RESULTS.json gets, for each model and text, the share of right answers and how many questions there were.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from typing import Any

from sarqc.entrypoints.evaluate import zero_shot
from sarqc.model.lm_eval import CLOZE
from sarqc.system import versions


def ask(model: str, text: str) -> dict[str, Any]:
    """Right answers of a model: their share, its standard error and the number of questions."""
    metrics = zero_shot(model, [CLOZE], text=text, packed=False, dtype="float32")[CLOZE]
    right, questions = metrics["acc"], int(metrics["sample_len"])
    return {"accuracy": right, "error": sqrt(right * (1 - right) / questions), "questions": questions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("models", nargs="+", help="NAME=MODEL")
    parser.add_argument("--text", action="append", dest="texts", required=True)
    args = parser.parse_args()
    known = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {"rows": []}
    for name, _, model in (argument.partition("=") for argument in args.models):
        for text in args.texts:
            what = {"model": name, "text": Path(text).name}
            if any(what.items() <= row.items() for row in known["rows"]):
                continue
            known["rows"].append(what | ask(model, text))
            known["versions"] = versions() | {"lm-eval": version("lm-eval")}
            args.results.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(known["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()

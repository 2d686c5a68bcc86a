"""What a quantized head and quantized embeddings cost: size, and perplexity on held-out text, with and without them.

    python -m benchmarks.head benchmarks/results/head.json [--bits 4 3]

SmolLM2-135M, whose head is tied to the embeddings: where one of them is quantized, they are written apart. 16 sequences
of 512 tokens, groups of 64; Python's language reference, calibrated on some topics and evaluated on the others.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import sarqc
from sarqc.system import versions

WINDOWS, SEQLEN, GROUP_SIZE = 16, 512, 64
HEAD, EMBEDDING = "lm_head", "embed_tokens"
CASES: tuple[dict[str, Any], ...] = (
    {},
    {"include": (HEAD,)},
    {"include": (HEAD, EMBEDDING)},
    {"include": (HEAD, EMBEDDING), "embedding_bits": 8},
)


def measured(model: str, out: Path, bits: int, options: dict[str, Any]) -> dict[str, Any]:
    """A run and its evaluation."""
    sarqc.quantize(model, out, bits=bits, group_size=GROUP_SIZE, num_samples=WINDOWS, seqlen=SEQLEN, **options)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    perplexity = sarqc.evaluate(out, seqlen=SEQLEN, max_windows=WINDOWS).perplexity
    return {"bits": bits, **options, "bytes": size, "perplexity": perplexity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    args = parser.parse_args()
    record: dict[str, Any] = {"windows": WINDOWS, "seqlen": SEQLEN, "group_size": GROUP_SIZE, "versions": versions()}
    record["rows"] = []
    with tempfile.TemporaryDirectory() as folder:
        for bits in args.bits:
            for number, options in enumerate(CASES):
                record["rows"].append(measured(args.model, Path(folder, f"{bits}-{number}"), bits, options))
                args.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                print(record["rows"][-1], flush=True)


if __name__ == "__main__":
    main()

"""What a quantized head costs: size, and perplexity on held-out text, with and without it.

    python -m benchmarks.head benchmarks/results/head.json [--bits 4 3]

SmolLM2-135M, whose head is tied to the embeddings and gets a weight of its own here. 16 sequences of 512 tokens, groups
of 64; Python's language reference, calibrated on some topics and evaluated on the others.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

import sarqc
from sarqc.system import versions

WINDOWS, SEQLEN, GROUP_SIZE = 16, 512, 64


def untied(model: str, folder: Path) -> Path:
    """The model with a head of its own, which has the weight of the embeddings."""
    loaded, tokenizer = sarqc.load(model, dtype="bfloat16")
    loaded.config.tie_word_embeddings = False
    loaded.lm_head.weight = nn.Parameter(loaded.get_input_embeddings().weight.detach().clone())
    loaded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measured(model: Path, out: Path, bits: int, include: tuple[str, ...]) -> dict[str, Any]:
    """A run and its evaluation."""
    sarqc.quantize(model, out, bits=bits, group_size=GROUP_SIZE, include=include, num_samples=WINDOWS, seqlen=SEQLEN)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    perplexity = sarqc.evaluate(out, seqlen=SEQLEN, max_windows=WINDOWS).perplexity
    return {"bits": bits, "include": list(include), "bytes": size, "perplexity": perplexity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    args = parser.parse_args()
    record: dict[str, Any] = {"windows": WINDOWS, "seqlen": SEQLEN, "group_size": GROUP_SIZE, "versions": versions()}
    record["rows"] = []
    with tempfile.TemporaryDirectory() as folder:
        model = untied(args.model, Path(folder, "model"))
        for bits in args.bits:
            for include in ((), ("lm_head",)):
                out = Path(folder, f"{bits}-{len(include)}")
                record["rows"].append(measured(model, out, bits, include))
                args.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                print(record["rows"][-1], flush=True)


if __name__ == "__main__":
    main()

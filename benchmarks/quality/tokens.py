"""The first windows of a text as a file, so that every tool calibrates on the same tokens.

python -m benchmarks.quality.tokens MODEL TEXT.txt OUT.safetensors --num-samples 16 --seqlen 512
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from sarqc.model.hub import locate


def first_windows(model: str, text: str, count: int, seqlen: int) -> torch.Tensor:
    """The first `count` windows of `seqlen` tokens, int64 [count, seqlen], without special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(locate(model))
    ids = tokenizer(Path(text).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: count * seqlen]).view(count, seqlen)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    args = parser.parse_args()
    save_file({"tokens": first_windows(args.model, args.text, args.num_samples, args.seqlen)}, args.out)


if __name__ == "__main__":
    main()

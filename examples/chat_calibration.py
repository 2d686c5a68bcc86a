"""Calibrate on conversations, in the very form in which a chat model will see them.

    python examples/chat_calibration.py Qwen/Qwen3-0.6B qwen3-w4 conversations.jsonl

A line of the file is {"messages": [{"role": "user", "content": "..."}, ...]}. Without a file, questions and answers are
made from the language reference that comes with Python.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoTokenizer

import sarqc
from sarqc.model.hub import locate

Conversation = list[dict[str, str]]


def conversations(path: str | None) -> Iterable[Conversation]:
    """Lists of {"role", "content"}: of a JSON Lines file, or made from Python's topics."""
    if path is not None:
        with Path(path).open(encoding="utf-8") as file:
            yield from (json.loads(line)["messages"] for line in file if line.strip())
        return
    for name in sorted(topics):
        question = {"role": "user", "content": f"What does Python's reference say about {name}?"}
        yield [question, {"role": "assistant", "content": topics[name]}]


def windows(tokenizer: Any, chats: Iterable[Conversation], seqlen: int) -> torch.Tensor:
    """int64 [S, seqlen]: conversations one behind the other, each with the template's own special tokens, cut up.

    The template writes the tokens that begin a text, so the tokenizer must not add its own again.
    """
    stream: list[int] = []
    for chat in chats:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(stream) // seqlen
    return torch.tensor(stream[: count * seqlen], dtype=torch.int64).view(count, seqlen)


def main(
    model: str = "smollm2",
    out: str | Path = "smollm2-w4-chat",
    path: str | None = None,
    seqlen: int = 512,
    num_samples: int = 32,
    **settings: Any,
) -> sarqc.Result:
    """Quantize `model` to `out` on `num_samples` windows of conversations; settings: as `sarqc.quantize` takes them."""
    tokenizer = AutoTokenizer.from_pretrained(locate(model))
    tokens = windows(tokenizer, conversations(path), seqlen)
    print(f"{len(tokens)} windows of {seqlen} tokens; the first begins: {tokenizer.decode(tokens[0, :24])!r}")
    result = sarqc.quantize(model, out, dataset=tokens, num_samples=min(num_samples, len(tokens)), **settings)
    print(f"output error {result.report['error']:.2e}, RTN {result.report['rtn_error']:.2e}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:4])

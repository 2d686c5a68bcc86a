"""Calibrate on conversations, in the very form in which a chat model will see them.

    python examples/chat_calibration.py Qwen/Qwen3-0.6B qwen3-w4 conversations.jsonl

A line of the file is {"messages": [{"role": "user", "content": "..."}, ...]}. Without a file, questions and answers are
made from the language reference that comes with Python. The model's own chat template is applied.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import sarqc

Conversation = list[dict[str, str]]


def conversations(path: str | None) -> Iterator[Conversation]:
    """Lists of {"role", "content"}: of a JSON Lines file, or made from Python's topics."""
    if path is not None:
        with Path(path).open(encoding="utf-8") as file:
            yield from (json.loads(line)["messages"] for line in file if line.strip())
        return
    for name in sorted(topics):
        question = {"role": "user", "content": f"What does Python's reference say about {name}?"}
        yield [question, {"role": "assistant", "content": topics[name]}]


def main(
    model: str = "smollm2",
    out: str | Path = "smollm2-w4-chat",
    path: str | None = None,
    seqlen: int = 512,
    num_samples: int = 32,
    **options: Any,
) -> sarqc.Result:
    """Quantize `model` to `out` on `num_samples` sequences; options: as `sarqc.quantize` takes them."""
    chats = list(conversations(path))  # a data set with a column "messages" would do as well
    result = sarqc.quantize(model, out, dataset=chats, seqlen=seqlen, num_samples=num_samples, **options)
    print(f"output error {result.error:.2e}, round-to-nearest {result.rtn_error:.2e}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:4])

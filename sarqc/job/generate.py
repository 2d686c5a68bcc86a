"""Continue a text with a checkpoint, to see that it speaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sarqc.errors import ArgumentError
from sarqc.job.load import load
from sarqc.model.tokenizer import check_tokens, encode


def generate(model: str | Path, prompt: str, *, max_new_tokens: int = 48, **how: Any) -> str:
    """`prompt` and its greedy continuation by at most `max_new_tokens` tokens; `how` as in `load`."""
    if not prompt:
        raise ArgumentError("prompt is empty: give at least one word to continue")
    if max_new_tokens < 1:
        raise ArgumentError(f"max_new_tokens = {max_new_tokens} is too small: use 1 or more")
    built, tokenizer = load(model, **how)
    inputs = torch.tensor([encode(tokenizer, prompt)], dtype=torch.int64, device=built.device)
    check_tokens(inputs, built)
    with torch.inference_mode():
        tokens = built.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens, do_sample=False
        )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))

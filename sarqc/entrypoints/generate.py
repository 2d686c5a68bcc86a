"""Text from a checkpoint: one completion, or a conversation.

A conversation is a history, the model's chat template and answers as a stream of text.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sarqc.config import check_seed
from sarqc.entrypoints.load import load
from sarqc.errors import ArgumentError
from sarqc.model.generate import Stream
from sarqc.model.tokenizer import check_tokens, encode

UNFINISHED = "\ufffd"  # what a tokenizer writes for a character that only has some of its bytes


class Chat:
    """A conversation. With a chat template it is turns of user and assistant; without one it is one text, which the
    user and the model continue in turn.

    model, tokenizer: as `load` gives them. temperature: 0 is greedy. seed: of every draw of the conversation.
    max_new_tokens: longest answer.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, temperature: float = 0.0, seed: int = 0, max_new_tokens: int = 256
    ) -> None:
        _check_sampling(temperature, seed, max_new_tokens)
        self.tokenizer = tokenizer
        self.turns: list[dict[str, str]] = []
        self.produced = 0
        """Tokens of the last answer."""
        self._stream = Stream(model)
        self._answer = partial(
            self._stream.tokens,
            limit=max_new_tokens,
            temperature=temperature,
            generator=torch.Generator().manual_seed(seed),
        )

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer knows how a conversation is written."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def reset(self) -> None:
        """Clear the history; the random generator continues."""
        self.turns.clear()

    def say(self, text: str) -> Generator[str, None, None]:
        """The answer to `text`, streamed in parts.

        Closing the generator ends the answer; what it has yielded stays in the history. `ArgumentError` where the
        conversation exceeds the positions of the model; the history is then as before.
        """
        self.turns.append({"role": "user", "content": text})
        answer, ids = "", []
        self.produced = 0
        try:
            for token in self._answer(self._prompt()):
                ids.append(token)
                self.produced = len(ids)
                now = self.tokenizer.decode(ids, skip_special_tokens=True)
                if len(now) > len(answer) and not now.endswith(UNFINISHED):
                    piece, answer = now[len(answer) :], now
                    yield piece
        except ArgumentError as error:
            self.turns.pop()
            raise ArgumentError(f"{error}; begin anew with /reset") from error
        finally:
            if self.turns and self.turns[-1]["role"] == "user":
                self.turns.append({"role": "assistant", "content": answer})

    def _prompt(self) -> list[int]:
        """Tokens of the conversation so far."""
        if self.has_template:
            text = self.tokenizer.apply_chat_template(self.turns, tokenize=False, add_generation_prompt=True)
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        parts = [turn["content"] for turn in self.turns]
        pairs = ["".join(parts[at : at + 2]) for at in range(0, len(parts), 2)]
        return list(self.tokenizer("\n".join(pairs)).input_ids)


def open_chat(
    model: str | Path, *, temperature: float = 0.0, seed: int = 0, max_new_tokens: int = 256, **how: Any
) -> Chat:
    """A conversation with the model of that name; `how` as in `load`."""
    _check_sampling(temperature, seed, max_new_tokens)  # loading takes minutes
    return Chat(*load(model, **how), temperature=temperature, seed=seed, max_new_tokens=max_new_tokens)


def _check_sampling(temperature: float, seed: int, max_new_tokens: int) -> None:
    if not 0 <= temperature < float("inf"):
        raise ArgumentError(f"temperature = {temperature} is not usable: use 0 (greedy) or more")
    _check_length(max_new_tokens)
    check_seed(seed)


def _check_length(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ArgumentError(f"max_new_tokens = {max_new_tokens} is too small: use 1 or more")


def generate(model: str | Path, prompt: str, *, max_new_tokens: int = 48, **how: Any) -> str:
    """A text and its greedy continuation.

    Args:
        model: As in `load`.
        prompt: Text to continue.
        max_new_tokens: Most tokens to add.
        **how: Other arguments of `load`.

    Returns:
        `prompt` and its continuation.

    Raises:
        ArgumentError: An empty prompt, one that the model cannot read to its end, or `max_new_tokens` below 1.
        SarqcError: What `load` raises.
    """
    if not prompt:
        raise ArgumentError("prompt is empty: give at least one word to continue")
    _check_length(max_new_tokens)
    built, tokenizer = load(model, **how)
    inputs = torch.tensor([encode(tokenizer, prompt)], dtype=torch.int64, device=built.device)
    check_tokens(inputs, built)
    with torch.inference_mode():
        tokens = built.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens, do_sample=False
        )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))

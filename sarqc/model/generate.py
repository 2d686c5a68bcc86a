"""Tokens one at a time, as they are chosen; transformers' `generate` returns them at the end.

The draw takes a `torch.Generator` of the caller's; transformers' own sampling draws from the global one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sarqc.errors import ArgumentError


class Stream:
    """A causal language model with the keys and values of what it has read.

    A text that goes on where the last one stopped, as a conversation does, is read from there; any other from the
    start.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._cache: Any = None
        self._read: list[int] = []

    @property
    def longest(self) -> int | None:
        """Most tokens that the model's positions reach; None where its configuration does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def ends(self) -> frozenset[int]:
        """Tokens after which the model has nothing more to say."""
        eos = self.model.generation_config.eos_token_id
        return frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])

    def tokens(
        self, tokens: Sequence[int], *, limit: int, temperature: float, generator: torch.Generator
    ) -> Iterator[int]:
        """The tokens that follow `tokens`, at most `limit`; one that ends the text is the last, and is not given.

        temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn with
        `generator`, on the CPU. Raises `ArgumentError` where `tokens` leave the model no room.
        """
        new = list(tokens)
        if not new or (self.longest is not None and len(new) >= self.longest):
            raise ArgumentError(f"a text of {len(new)} tokens cannot be continued: the model takes 1 to {self.longest}")
        known = len(self._read)
        if self._cache is not None and known < len(new) and new[:known] == self._read:
            new = new[known:]
        else:
            self._cache, self._read = None, []
        for _ in range(min(limit, limit if self.longest is None else self.longest - len(tokens))):
            token = choose(self._next(new), temperature, generator)
            if token in self.ends:
                return
            yield token
            new = [token]

    def _next(self, new: list[int]) -> Tensor:
        """Logits [V] after reading `new` too; interrupted, what was read is forgotten, as layers may differ."""
        held, self._cache = self._cache, None
        ids = torch.tensor([new], device=self.model.device)
        with torch.inference_mode():
            out = self.model(input_ids=ids, past_key_values=held, use_cache=True, logits_to_keep=1)
        self._read += new
        self._cache = out.past_key_values
        logits: Tensor = out.logits[0, -1]
        return logits


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """A token by its logits [V]: the likeliest at temperature 0, otherwise drawn from softmax(logits / temperature)."""
    if temperature == 0:
        return int(logits.argmax())
    weights = (logits.float().cpu() / temperature).softmax(-1)
    return int(torch.multinomial(weights, 1, generator=generator))

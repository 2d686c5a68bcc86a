"""Tokens one at a time, as they are chosen; transformers' `generate` returns them at the end.

The draw takes a `torch.Generator` of the caller's; transformers' own sampling draws from the global one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sarqc.errors import ArgumentError

_CACHES = ("cache", "past_key_values", "cache_params")
"""Names that versions of transformers and models have for what is kept of the tokens that were read."""


def cache_name(model: Any) -> str:
    """The argument and output of a model's forward for its cache, by this version of transformers; "" for none."""
    takes = inspect.signature(model.forward).parameters
    return next((name for name in _CACHES if name in takes), "")


class Stream:
    """A causal language model with the keys and values, or states, of what it has read.

    A text that goes on where the last one stopped, as a conversation does, is read from there; any other from the
    start. A model without a cache reads the whole text for each token. States are continued by one token at a time:
    Mamba in transformers reads several tokens as if they were the first.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._name = cache_name(model)
        self._most = 1 if getattr(model, "_is_stateful", False) else math.inf  # tokens that continue a cache
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
        text = list(tokens)
        if not text or (self.longest is not None and len(text) >= self.longest):
            raise ArgumentError(
                f"a text of {len(text)} tokens cannot be continued: the model takes 1 to {self.longest}"
            )
        for _ in range(min(limit, limit if self.longest is None else self.longest - len(text))):
            token = choose(self._next(text), temperature, generator)
            if token in self.ends:
                return
            yield token
            text.append(token)

    def _next(self, text: list[int]) -> Tensor:
        """Logits [V] after `text`; interrupted, what was read is forgotten, as layers may differ."""
        held, self._cache = self._cache, None
        known = len(self._read)
        if held is None or not known < len(text) <= known + self._most or text[:known] != self._read:
            held, known = None, 0
        ids = torch.tensor([text[known:]], device=self.model.device)
        given = {} if held is None else {self._name: held}
        with torch.inference_mode():
            out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)
        self._cache, self._read = out.get(self._name), list(text)
        logits: Tensor = out.logits[0, -1]
        return logits


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """A token by its logits [V]: the likeliest at temperature 0, otherwise drawn from softmax(logits / temperature)."""
    if temperature == 0:
        return int(logits.argmax())
    weights = (logits.float().cpu() / temperature).softmax(-1)
    return int(torch.multinomial(weights, 1, generator=generator))

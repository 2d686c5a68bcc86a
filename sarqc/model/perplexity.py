"""Perplexity, and how far a model is from another one, with the protocol beside the numbers: without it they mean
nothing.

Perplexity alone hides harm: a model can keep it and answer differently. So where there is a reference, two more
numbers come out of the same forward pass: how often the likeliest next token is the reference's, and the
Kullback-Leibler divergence of the next-token distributions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sarqc.errors import NumericError
from sarqc.model.dataset import Windows
from sarqc.model.tokenizer import check_tokens
from sarqc.system import range_advice

POSITIONS_AT_ONCE = 256
"""Positions whose logits are worked on together: in fp32 they take 256 KiB for each 256 words of the vocabulary."""


@dataclass(frozen=True)
class Perplexity:
    """perplexity = exp(nll / predicted). nll: summed over predicted tokens, in nats. seconds: wall time."""

    perplexity: float
    nll: float
    predicted: int
    seconds: float
    protocol: dict[str, Any]


@dataclass
class Tally:
    """Sums over predicted tokens, in nats: nll, and against a reference P, sum of KL(P || Q) and agreements."""

    nll: float = 0.0
    predicted: int = 0
    divergence: float = 0.0
    agreed: int = 0

    def add(self, logits: Tensor, following: Tensor, reference: Tensor | None = None) -> None:
        """Add positions: logits [T, V] of this model, the tokens int64 [T] that follow, logits [T, V] of a reference.

        Taken in fp32. Raises `NumericError` where a logit that counts is NaN or Inf; nothing is added then.
        """
        logs = torch.log_softmax(logits.float(), -1)
        loss = -float(logs.gather(1, following[:, None]).double().sum())
        away, agreed = 0.0, 0
        if reference is not None:
            expected = torch.log_softmax(reference.float(), -1)
            away = float((expected.exp() * (expected - logs)).sum(-1).double().sum())
            agreed = int((expected.argmax(-1) == logs.argmax(-1)).sum())
        if not (math.isfinite(loss) and math.isfinite(away)):
            raise NumericError("the model's logits are not finite on the evaluation text")
        self.nll += loss
        self.divergence += away
        self.agreed += agreed
        self.predicted += len(following)

    @property
    def perplexity(self) -> float:
        """exp of the mean nll."""
        return math.exp(min(self.nll / max(self.predicted, 1), 700.0))

    @property
    def kl(self) -> float:
        """Mean KL(reference || model) per token, in nats."""
        return max(self.divergence / max(self.predicted, 1), 0.0)

    @property
    def agreement(self) -> float:
        """Share of positions at which both find the same token likeliest."""
        return self.agreed / max(self.predicted, 1)


@torch.inference_mode()
def perplexity(
    model: Any, windows: Windows, *, on_window: Callable[[int, int, float], None] | None = None
) -> Perplexity:
    """Perplexity of `model` over windows that do not overlap; each window predicts its tokens from the second on.

    Logits are taken in fp32. Raises `NumericError` where the model returns NaN or Inf. on_window(done, total, running
    perplexity) is called after each window.
    """
    check_tokens(windows.tokens, model)
    began = time.perf_counter()
    tally = Tally()
    total = len(windows.tokens)
    for done, window in enumerate(windows.tokens.split(1), start=1):
        tokens = window.to(model.device)
        logits = model(tokens, use_cache=False).logits[0, :-1]
        try:
            for part, following in zip(logits.split(POSITIONS_AT_ONCE), tokens[0, 1:].split(POSITIONS_AT_ONCE)):
                tally.add(part, following)
        except NumericError as error:
            raise NumericError(
                f"the model's logits are not finite in evaluation window {done} of {total}: {range_advice(model.dtype)}"
            ) from error
        if on_window:
            on_window(done, total, tally.perplexity)
    protocol = windows.record() | {
        "stride": windows.tokens.shape[1],
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "torch": torch.__version__,
    }
    return Perplexity(tally.perplexity, tally.nll, tally.predicted, time.perf_counter() - began, protocol)

"""Perplexity, with the protocol beside the number: without it the number means nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sarqc.errors import NumericError
from sarqc.model.calibration import Windows
from sarqc.model.tokenizer import check_tokens


@dataclass(frozen=True)
class Perplexity:
    """perplexity = exp(nll / predicted). nll: summed over predicted tokens, in nats. seconds: wall time."""

    perplexity: float
    nll: float
    predicted: int
    seconds: float
    protocol: dict[str, Any]


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
    nll, predicted = 0.0, 0
    total = len(windows.tokens)
    for done, window in enumerate(windows.tokens.split(1), start=1):
        loss = _window_nll(model, window.to(model.device))
        if not math.isfinite(loss):
            raise NumericError(f"the model's logits are not finite in evaluation window {done} of {total}")
        nll, predicted = nll + loss, predicted + window.shape[1] - 1
        if on_window:
            on_window(done, total, math.exp(min(nll / predicted, 700.0)))
    protocol = windows.record() | {
        "stride": windows.tokens.shape[1],
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "torch": torch.__version__,
    }
    return Perplexity(math.exp(min(nll / predicted, 700.0)), nll, predicted, time.perf_counter() - began, protocol)


def _window_nll(model: Any, window: Tensor) -> float:
    """Summed negative log likelihood of a window [1, L] after its first token."""
    logits = model(window, use_cache=False).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits.float(), window[0, 1:], reduction="sum"))

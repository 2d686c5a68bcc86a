"""Perplexity of a checkpoint by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sarqc.job.load import load
from sarqc.model import calibration
from sarqc.model.evaluate import Perplexity, perplexity


def evaluate(
    model: str | Path,
    *,
    text: str = calibration.BUILTIN,
    seqlen: int = 512,
    max_windows: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    on_window: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Perplexity of a model, quantized or not, on a text it was not calibrated on.

    text: a UTF-8 file, a data set, or `builtin` (whose evaluation part shares no topic with its calibration part).
    seqlen: tokens per window. max_windows: only the last so many windows of the text.
    """
    built, tokenizer = load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    windows = calibration.windows(text, tokenizer, part="evaluation", seqlen=seqlen)
    if max_windows is not None:
        windows = windows.last(max_windows)
    return perplexity(built, windows, on_window=on_window)

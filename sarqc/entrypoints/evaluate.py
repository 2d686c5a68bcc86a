"""Perplexity and accuracy of a checkpoint by name, alone or beside its original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sarqc.checkpoint.folders import refuse_place
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.entrypoints.load import load
from sarqc.errors import ArgumentError
from sarqc.model import dataset, lm_eval
from sarqc.model.hub import locate
from sarqc.model.lazy_model import Skeleton
from sarqc.model.packed_linear import is_packed
from sarqc.model.perplexity import Perplexity, perplexity
from sarqc.model.tokenizer import load_tokenizer
from sarqc.pipeline import stream
from sarqc.report import report as reports
from sarqc.system import resolve_device, resolve_dtype


def evaluate(
    model: str | Path,
    *,
    text: str = dataset.BUILTIN,
    seqlen: int = 512,
    max_windows: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    packed: bool = True,
    trust_remote_code: bool = False,
    on_window: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Perplexity of a model, quantized or not, on a text it was not calibrated on.

    packed, dtype: as in `load`: by default a quantized model is measured as it is served, on its packed weights in the
    checkpoint's dtype. To compare with an unquantized one in the same arithmetic, name the dtype of both; the protocol
    of the result says what it was.
    text: a UTF-8 file, a data set, or `builtin` (whose evaluation part shares no topic with its calibration part).
    seqlen: tokens per window. max_windows: only the last so many windows of the text.
    """
    built, tokenizer = load(model, device=device, dtype=dtype, packed=packed, trust_remote_code=trust_remote_code)
    windows = dataset.windows(text, tokenizer, part="evaluation", seqlen=seqlen)
    dataset.check_seqlen(seqlen, built.config.get_text_config(), model)
    if max_windows is not None:
        windows = windows.last(max_windows)
    found = perplexity(built, windows, on_window=on_window)
    return replace(found, protocol=found.protocol | {"packed": is_packed(built)})


def zero_shot(
    model: str | Path,
    tasks: Sequence[str],
    *,
    text: str = dataset.BUILTIN,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    packed: bool = True,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, float]]:
    """Metrics by task from lm-eval; tasks and text as in `sarqc.model.lm_eval.zero_shot`."""
    built, tokenizer = load(model, device=device, dtype=dtype, packed=packed, trust_remote_code=trust_remote_code)
    return lm_eval.zero_shot(built, tokenizer, tasks, text=text, limit=limit)


@dataclass(frozen=True)
class Saved:
    """entry: what was added to the report's `quality`. card: whether the model card says it too, or was edited."""

    entry: dict[str, Any]
    card: bool


def evaluate_and_save(
    out: str | Path,
    *,
    original: str | Path | None = None,
    text: str = dataset.BUILTIN,
    seqlen: int = 512,
    max_windows: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    on_block: Callable[[int, int], None] | None = None,
) -> Saved:
    """Measure a checkpoint and the model it was made from on the same windows, and put it into its report and card.

    Both run block by block, so that neither is ever whole in memory. original: where that model is now; by default
    where the report says it was. on_block(done, total). Another measurement of the same windows replaces the first.
    """
    folder = Path(out).expanduser()
    report = reports.load(folder)
    refuse_place(folder / reports.REPORT, "report")
    source = locate(original or report["model"], trust_remote_code=trust_remote_code)
    windows = dataset.windows(
        text, load_tokenizer(folder, trust_remote_code=trust_remote_code), part="evaluation", seqlen=seqlen
    )
    windows = windows if max_windows is None else windows.last(max_windows)
    where, left = resolve_device(device), []
    for number, place in enumerate((source, folder)):
        checkpoint = open_checkpoint(place)
        if place is source and checkpoint.format is not None:
            raise ArgumentError(f"original = {str(source)!r} is quantized itself: give the model before that")
        skeleton = Skeleton.from_folder(place, checkpoint, trust_remote_code=trust_remote_code)
        dataset.check_seqlen(seqlen, skeleton.text_config, place)
        kept, total = resolve_dtype(dtype, where, skeleton.dtype), 2 * len(skeleton.blocks)
        skeleton.load_outer(checkpoint, where, kept, head=True)

        def told(index: int, done: int = number * len(skeleton.blocks), total: int = total) -> None:
            if on_block:
                on_block(done + index, total)

        left.append(stream.leave(skeleton, checkpoint, windows.tokens, told))
    # What stands outside the blocks is the original's, byte for byte, so that one head serves both.
    before = stream.judge(skeleton, windows, left[0]).perplexity
    after = stream.judge(skeleton, windows, left[1], left[0])
    entry = windows.record() | {
        "before": before,
        "after": after.perplexity,
        "agreement": after.agreement,
        "kl": after.kl,
        "dtype": str(kept).removeprefix("torch."),
        "device": str(where),
    }
    others = [e for e in report.get("quality", []) if e.get("fingerprint") != entry["fingerprint"]]
    return Saved(entry, reports.update(folder, report | {"quality": [*others, entry]}))

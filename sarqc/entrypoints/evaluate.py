"""Perplexity and accuracy of a checkpoint by name, alone or beside its original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from sarqc.checkpoint.folders import check_place
from sarqc.checkpoint.formats.common import outside_blocks
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.config import AUTO
from sarqc.config_compare import EVALUATE, SEQLEN, EvaluationConfig
from sarqc.entrypoints.load import load
from sarqc.errors import ArgumentError
from sarqc.keywords import EvaluationKeywords
from sarqc.model import dataset, lm_eval
from sarqc.model.architecture import read_config
from sarqc.model.calibration_data import windows
from sarqc.model.hub import locate
from sarqc.model.lazy_model import LazyModel
from sarqc.model.packed_linear import is_packed
from sarqc.model.perplexity import Perplexity, perplexity
from sarqc.model.tokenizer import load_tokenizer
from sarqc.options import documented, split_by_config
from sarqc.pipeline import blockwise_forward
from sarqc.report import report as reports
from sarqc.system import resolve_device, resolve_dtype


@documented(*EVALUATE)
def evaluate(
    model: str | Path,
    *,
    config: EvaluationConfig | None = None,
    on_window: Callable[[int, int, float], None] | None = None,
    **options: Unpack[EvaluationKeywords],
) -> Perplexity:
    """Perplexity of a model, quantized or not, on a text it was not calibrated on.

    By default a quantized model is measured on its packed weights, and in the dtype that an unquantized one is measured
    in, so that their perplexities differ by quantization alone.

    Args:
        model: Local folder, hub id, or "smollm2".
        config: The options as one object; a keyword changes a field.
        on_window: Called after each sequence with (done, total, perplexity so far).
        {options}

    Returns:
        Perplexity and the protocol that it was measured by.

    Raises:
        SarqcError: Anything wrong with the input.
    """
    how = EvaluationConfig.made(config, split_by_config(EVALUATE, options)[EvaluationConfig])
    built, tokenizer = _loaded(model, how)
    result = perplexity(built, _windows(how, tokenizer, built.config.get_text_config(), model), on_window=on_window)
    return replace(result, protocol=result.protocol | {"packed": is_packed(built)})


def zero_shot(
    model: str | Path,
    tasks: Sequence[str],
    *,
    config: EvaluationConfig | None = None,
    **options: Unpack[EvaluationKeywords],
) -> dict[str, dict[str, float]]:
    """Metrics by task from lm-eval; tasks and text as in `sarqc.model.lm_eval.zero_shot`, options as in `evaluate`."""
    how = EvaluationConfig.made(config, split_by_config(EVALUATE, options)[EvaluationConfig])
    built, tokenizer = _loaded(model, how)
    return lm_eval.zero_shot(built, tokenizer, tasks, text=how.text, limit=how.limit)


def _loaded(model: str | Path, how: EvaluationConfig) -> tuple[Any, Any]:
    on_cpu = resolve_device(how.device).type == "cpu"
    dtype = "float32" if on_cpu and how.dtype == AUTO else how.dtype  # `load` takes 16 bits for packed weights
    return load(model, device=how.device, dtype=dtype, packed=how.packed, trust_remote_code=how.trust_remote_code)


def _windows(how: EvaluationConfig, tokenizer: Any, config: Any, model: str | Path) -> dataset.Windows:
    seqlen = dataset.sequence_length(how.seqlen, SEQLEN, config, model)
    text = windows(how.text, lambda: tokenizer, seqlen, part="evaluation", column=how.column)
    return text if how.max_windows is None else text.last(how.max_windows)


@dataclass(frozen=True)
class Saved:
    """entry: what was added to the report's `quality`. card: whether the model card says it too, or was edited."""

    entry: dict[str, Any]
    card: bool


def evaluate_and_save(
    out: str | Path,
    *,
    original: str | Path | None = None,
    config: EvaluationConfig | None = None,
    on_block: Callable[[int, int], None] | None = None,
    **options: Unpack[EvaluationKeywords],
) -> Saved:
    """Measure a checkpoint and the model it was made from on the same windows, and put it into its report and card.

    Both run block by block on dense weights, so that neither is ever whole in memory, and in one dtype: the original's
    where none is named. original: where that model is now; by default where the report says it was. config, options: as
    in `evaluate`. on_block(done, total): called before the first block and after each. Another measurement of the same
    windows replaces the first.
    """
    how = EvaluationConfig.made(config, split_by_config(EVALUATE, options)[EvaluationConfig])
    trust_remote_code = how.trust_remote_code
    folder = Path(out).expanduser()
    report = reports.load(folder)
    check_place(folder / reports.REPORT, "report")
    source = locate(original or report["model"], trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    text, kept = _windows(how, tokenizer, read_config(folder, trust_remote_code).get_text_config(), folder), None
    where, outputs = resolve_device(how.device), []
    models: list[LazyModel] = []
    for number, place in enumerate((source, folder)):
        with open_checkpoint(place) as checkpoint:
            if place is source and checkpoint.format is not None:
                raise ArgumentError(f"original = {str(source)!r} is quantized itself: give the model before that")
            lazy = LazyModel.from_folder(place, checkpoint, trust_remote_code=trust_remote_code)
            kept, blocks = kept or resolve_dtype(how.dtype, where, lazy.dtype), len(lazy.blocks)
            lazy.load_outer(checkpoint, where, kept, head=True)

            def progress(index: int, first: int = number * blocks, total: int = 2 * blocks) -> None:
                if on_block:
                    on_block(first + index + 1, total)

            if on_block and not number:
                on_block(0, 2 * blocks)
            outputs.append(blockwise_forward.last_block_output(lazy, checkpoint, text.tokens, progress))
            models = [*models, lazy] if outside_blocks(checkpoint.linears()) else [lazy]
    # What stands outside the blocks is the original's, byte for byte, unless the head is quantized: one serves both.
    before = blockwise_forward.score(models[0], text, outputs[0]).perplexity
    after = blockwise_forward.score(models[-1], text, outputs[1], outputs[0], models[0])
    entry = text.record() | {
        "before": before,
        "after": after.perplexity,
        "agreement": after.agreement,
        "kl": after.kl,
        "dtype": str(kept).removeprefix("torch."),
        "device": str(where),
    }
    others = [e for e in report.get("quality", []) if e.get("fingerprint") != entry["fingerprint"]]
    return Saved(entry, reports.write(folder, report | {"quality": [*others, entry]}))

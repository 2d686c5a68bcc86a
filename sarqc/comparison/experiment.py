"""What a comparison is measured on: one model, its texts, and the ways to quantize and judge it block by block.

Two lazy models hold a block each, one that solves and one that judges, so that the codes of a block are
tried on the texts before the next block is read; the model is never whole in memory, quantized or not.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sarqc.checkpoint.formats.common import outside_blocks
from sarqc.checkpoint.reader import Checkpoint, open_checkpoint
from sarqc.comparison import table as tables
from sarqc.comparison.store import folder_fingerprint
from sarqc.config import MethodConfig, QuantConfig
from sarqc.config_compare import SEQLEN, ComparisonConfig, MeasureConfig
from sarqc.errors import ArgumentError, CheckpointError, NumericError
from sarqc.method.lambda_search import LambdaSearch
from sarqc.method.layer import LayerReport
from sarqc.model import dataset
from sarqc.model.calibration_data import windows
from sarqc.model.layers import is_wanted
from sarqc.model.lazy_model import LazyModel
from sarqc.model.source import PatchedSource
from sarqc.model.tokenizer import load_tokenizer
from sarqc.options import record
from sarqc.pipeline import blockwise_forward, driver
from sarqc.pipeline.blockwise_forward import BlockOutput
from sarqc.pipeline.execution import Execution
from sarqc.system import resolve_device, resolve_dtype, versions

Detail = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One thing to measure. label: "NAME" or "NAME@LAMBDA". windows, seed: None where the method is not calibrated."""

    label: str
    quant: QuantConfig
    method: MethodConfig
    windows: int | None
    seed: int | None

    def record(self) -> dict[str, Any]:
        """What the cell is, as JSON values."""
        values = (self.label, self.quant.bits, self.quant.group_size, self.windows, self.seed)
        return dict(zip(tables.IDENTITY, values))


@dataclass(frozen=True)
class Other:
    """A checkpoint that something else wrote, to stand beside the cells. windows, seed: what it was calibrated on."""

    method: str
    bits: int
    group_size: int
    windows: int | None
    seed: int | None
    folder: Path

    @classmethod
    def parsed(cls, text: str) -> Other:
        """From METHOD:BITS:GROUP:WINDOWS:SEED=FOLDER, windows and seed empty where it was not calibrated."""
        what, _, folder = text.partition("=")
        parts = what.split(":")
        try:
            method, bits, group_size = parts[0], int(parts[1]), int(parts[2])
            windows, seed = (int(part) if part else None for part in parts[3:])
        except (ValueError, IndexError):
            raise ArgumentError(f"also = {text!r}: write METHOD:BITS:GROUP:WINDOWS:SEED=FOLDER") from None
        if not (Path(folder) / "config.json").is_file():
            raise ArgumentError(f"also = {text!r}: {folder!r} is no folder of a checkpoint")
        return cls(method, bits, group_size, windows, seed, Path(folder))

    def record(self) -> dict[str, Any]:
        """What it says it is, as JSON values."""
        return {name: getattr(self, name) for name in tables.IDENTITY}


@dataclass
class Text:
    """A text to judge on. reference: what leaves the last block of the unquantized model."""

    windows: dataset.Windows
    reference: BlockOutput
    perplexity: float


@dataclass
class Experiment:
    """What all cells share. solver, evaluator: two models, because solving and judging hold a block each. drawn:
    calibration windows by seed; those of a smaller size are the first of them."""

    fingerprint: str
    folder: Path
    checkpoint: Checkpoint
    solver: LazyModel
    evaluator: LazyModel
    device: torch.device
    dtype: torch.dtype
    drawn: dict[int, Tensor]
    calibration: dataset.Windows
    texts: list[Text] = field(default_factory=list)


def make(checkpoint: Checkpoint, what: ComparisonConfig, column: str | None) -> Experiment:
    """Build the model of an open checkpoint, which the experiment reads from, and draw the calibration windows of every
    seed; the largest size must fit into the text."""
    folder = checkpoint.folder
    if checkpoint.format is not None:
        raise CheckpointError(f"{folder} is quantized already ({checkpoint.format.name}): give the original model")
    trust, sizes = what.trust_remote_code, sorted(set(what.num_samples))
    tokenizer = partial(load_tokenizer, folder, trust_remote_code=trust)
    where = resolve_device(what.device)
    solver, evaluator = (LazyModel.from_folder(folder, checkpoint, trust_remote_code=trust) for _ in range(2))
    slices = [lazy.split(partial(is_wanted, QuantConfig(ignore=what.ignore))) for lazy in (solver, evaluator)]
    if slices[0]:
        checkpoint = checkpoint.split(slices[0])
    seqlen = dataset.sequence_length(what.seqlen, SEQLEN, solver.text_config, folder)
    text = windows(what.dataset, tokenizer, seqlen, column=column)
    dataset.check_seqlen(text.tokens.shape[1], solver.text_config, folder)
    kept = resolve_dtype(what.dtype, where, solver.dtype)
    evaluator.load_outer(checkpoint, where, kept, head=True)
    drawn = {seed: text.nested(sizes, seed).tokens for seed in what.seeds}
    return Experiment(folder_fingerprint(folder), folder, checkpoint, solver, evaluator, where, kept, drawn, text)


def shorter(experiment: Experiment, what: ComparisonConfig, measure: MeasureConfig) -> Iterator[str]:
    """A line for each kind of sequence that is shorter than usual because the model is."""
    most = dataset.sequence_length(None, SEQLEN, experiment.evaluator.text_config, experiment.folder)
    for name, asked in (("calibration", what.seqlen), ("evaluation", measure.eval_seqlen)):
        if asked is None and most < SEQLEN:
            yield f"{name} sequences have {most} tokens, all positions of the model"


def add_texts(experiment: Experiment, measure: MeasureConfig, trust: bool) -> None:
    """Take the last windows of each text, and run the unquantized model over them."""
    config = experiment.evaluator.text_config
    seqlen = dataset.sequence_length(measure.eval_seqlen, SEQLEN, config, experiment.folder, "eval_seqlen")
    tokenizer = partial(load_tokenizer, experiment.folder, trust_remote_code=trust)
    for name in measure.texts:
        evaluation = windows(name, tokenizer, seqlen, part="evaluation", column=measure.column)
        evaluation = evaluation.last(measure.eval_windows)
        reference = blockwise_forward.last_block_output(experiment.evaluator, experiment.checkpoint, evaluation.tokens)
        perplexity = blockwise_forward.score(experiment.evaluator, evaluation, reference).perplexity
        experiment.texts.append(Text(evaluation, reference, perplexity))


def identity(experiment: Experiment, cell: Cell | Other) -> str:
    """Fingerprint of everything a cell's numbers depend on."""
    known = {
        "protocol": tables.PROTOCOL,
        "model": experiment.fingerprint,
        "texts": [text.windows.fingerprint for text in experiment.texts],
        "dtype": str(experiment.dtype),
        "device": experiment.device.type,
        "sarqc": versions()["sarqc"],
    }
    if isinstance(cell, Other):
        known |= cell.record() | {"folder": folder_fingerprint(cell.folder)}
    else:
        known |= {"quant": record(cell.quant), "method": record(cell.method), "seed": cell.seed}
    if isinstance(cell, Cell) and cell.seed is not None and cell.windows is not None:
        tokens = experiment.drawn[cell.seed][: cell.windows]
        known["calibration"] = dataset.Windows.of_tokens(tokens).fingerprint
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


# -- the work -------------------------------------------------------------------------------------------------------


def measure(experiment: Experiment, cell: Cell, detail: Detail) -> dict[str, Any]:
    """Run one cell, and judge each block as it is quantized. Logits that are not finite are a result, and stand in the
    record."""
    began = time.perf_counter()
    reports: list[LayerReport] = []
    solving = 0.0
    with ExitStack() as stack:
        forwards = [
            stack.enter_context(blockwise_forward.BlockwiseForward(experiment.evaluator, text.windows.tokens))
            for text in experiment.texts
        ]
        for result in _solved(experiment, cell, detail):
            solving += sum(result.seconds.get(stage, 0.0) for stage in ("scale", "solve"))
            reports += result.reports
            after = PatchedSource(experiment.checkpoint, result.weights, result.changed)
            experiment.evaluator.load_block(result.index, after, experiment.device, experiment.dtype)
            for each in forwards:
                each.finish_block(result.index)
            experiment.evaluator.unload_block(result.index)
        outputs = [each.hidden_states() for each in forwards]
    return cell.record() | {
        **_quality_of(experiment, outputs, experiment.evaluator),
        "error": sum(report.error for report in reports) / len(reports),
        "rtn_error": sum(report.rtn_error for report in reports) / len(reports),
        "reg_lambda": [min(r.reg_lambda for r in reports), max(r.reg_lambda for r in reports)],
        "fallbacks": sum(report.fallback is not None for report in reports),
        "seconds": {"solve": round(solving, 3), "total": round(time.perf_counter() - began, 3)},
    }


def _solved(experiment: Experiment, cell: Cell, detail: Detail) -> Iterator[driver.BlockResult]:
    tokens = None if cell.seed is None else experiment.drawn[cell.seed][: cell.windows]
    return driver.run(
        experiment.solver,
        experiment.checkpoint,
        tokens,
        cell.quant,
        cell.method,
        Execution(
            experiment.device,
            experiment.dtype,
            on_progress=lambda index, stage: detail(f"{cell.label} {cell.quant.bits} bits, block {index} {stage}"),
        ),
        driver.Start(lambda_search=LambdaSearch(seed=cell.seed or 0)),
    )


def measure_other(experiment: Experiment, other: Other, detail: Detail) -> dict[str, Any]:
    """Judge a checkpoint as it is, by the same code. Its head is taken to be the original's, unless it is quantized."""
    began = time.perf_counter()
    blocks = len(experiment.evaluator.blocks)

    def on_block(index: int) -> None:
        detail(f"{other.method}, {index + 1} of {blocks} blocks")

    with open_checkpoint(other.folder) as checkpoint:
        lazy = LazyModel.from_folder(other.folder, checkpoint)
        own = lazy if outside_blocks(checkpoint.linears()) else experiment.evaluator
        lazy.load_outer(checkpoint, experiment.device, experiment.dtype, head=own is lazy)
        outputs = [
            blockwise_forward.last_block_output(lazy, checkpoint, text.windows.tokens, on_block)
            for text in experiment.texts
        ]
    return other.record() | {
        **_quality_of(experiment, outputs, own),
        "error": None,
        "seconds": {"solve": None, "total": round(time.perf_counter() - began, 3)},
    }


def _quality_of(experiment: Experiment, outputs: Sequence[BlockOutput], model: LazyModel) -> dict[str, Any]:
    """quality: numbers by text. failed: why there are none for some of them, or None. model: whose head is taken."""
    quality: dict[str, Any] = {}
    failed = None
    for text, own in zip(experiment.texts, outputs):
        try:
            tally = blockwise_forward.score(model, text.windows, own, text.reference, experiment.evaluator)
        except NumericError as error:
            failed = str(error)
            continue
        quality[text.windows.text] = {
            "perplexity": tally.perplexity,
            "agreement": tally.agreement,
            "kl": tally.kl,
        }
    return {"quality": quality, "failed": failed}

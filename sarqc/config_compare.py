"""The options of comparisons and evaluations, each once; those that `sarqc quantize` has too are its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sarqc import kinds
from sarqc.config import BUILTIN, MIN_SEQLEN, CalibrationConfig, QuantConfig, RunConfig
from sarqc.kinds import AUTO
from sarqc.options import Config, described, option, options, same

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


SEQLEN = 512
"""Tokens per sequence of a comparison or an evaluation, unless asked for otherwise."""
_SEQLEN_TEXT = f"{SEQLEN}, or all positions of a shorter model"


def _values(kind: type[Config], name: str, default: tuple[Any, ...], help: str, **rest: Any) -> Any:
    """An option with several values of another configuration's option."""
    one = options(kind)[name]
    rest = {"panel": kind.panel, "flag": one.flag} | rest
    return option(default, kinds.several(one.kind), help, **rest)


@described
@dataclass(frozen=True)
class ComparisonConfig(Config):
    """What to compare: every method at every width, group size, number of sequences and seed."""

    panel: ClassVar[str] = "Weights"

    methods: Sequence[str] = option(
        ("rtn", "gptq", "sarqc-gptq"),
        kinds.several(dataclasses.replace(kinds.text("NAME or NAME@LAMBDA"), metavar="NAME")),
        "Methods; NAME@0.3 is a method at that fixed reg_lambda.",
    )
    bits: Sequence[int] = _values(QuantConfig, "bits", (4, 3), "Bit-widths.")
    group_sizes: Sequence[int | Literal["auto"]] = _values(
        QuantConfig, "group_size", (AUTO,), "Group sizes; -1: one scale per output row.", flag="--group-size"
    )
    sym: bool = same(QuantConfig, "sym")
    ignore: Sequence[str] = same(QuantConfig, "ignore")
    dataset: str | Path | Tensor | Sequence[Any] = same(CalibrationConfig, "dataset")
    num_samples: Sequence[int] = _values(CalibrationConfig, "num_samples", (16,), "Numbers of calibration sequences.")
    seqlen: int | None = same(CalibrationConfig, "seqlen", default_text=_SEQLEN_TEXT)
    seeds: Sequence[int] = _values(CalibrationConfig, "seed", (0,), "Seeds of the choice of sequences.")
    device: str = same(RunConfig, "device")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = same(RunConfig, "dtype")
    trust_remote_code: bool = same(RunConfig, "trust_remote_code")


@described
@dataclass(frozen=True)
class MeasureConfig(Config):
    """What to measure on, and what to show beside it."""

    panel: ClassVar[str] = "Evaluation"

    texts: Sequence[str] = option(
        (BUILTIN,),
        kinds.several(kinds.dataset(), repeated=True),
        "Evaluation data, as --dataset. Repeatable.",
        flag="--eval",
    )
    eval_seqlen: int | None = option(
        None, kinds.whole(MIN_SEQLEN), "Tokens per evaluation sequence.", default_text=_SEQLEN_TEXT
    )
    eval_windows: int = option(
        16, kinds.whole(1), "Evaluation sequences: the last of each text, or all of a shorter one."
    )
    column: str | None = same(CalibrationConfig, "column")
    also: Sequence[Any] = option(
        (),
        kinds.several(kinds.anything("METHOD:BITS:GROUP:SEQUENCES:SEED=FOLDER"), repeated=True),
        "Checkpoint of another tool, METHOD:BITS:GROUP:SEQUENCES:SEED=FOLDER. Repeatable.",
    )


@described
@dataclass(frozen=True)
class EvaluationConfig(Config):
    """How to measure one model."""

    panel: ClassVar[str] = "Evaluation"

    text: str = option(
        BUILTIN,
        kinds.text("a file, a data set NAME[:CONFIG[:SPLIT]], or builtin"),
        "Evaluation data: a file (text, JSON Lines, Parquet), a data set NAME[:CONFIG[:SPLIT]], or builtin (not the "
        "calibration topics).",
    )
    column: str | None = same(CalibrationConfig, "column", panel="Evaluation")
    seqlen: int | None = option(
        None,
        kinds.whole(MIN_SEQLEN),
        "Tokens per sequence; sequences do not overlap.",
        default_text=_SEQLEN_TEXT,
    )
    max_windows: int | None = option(
        None, kinds.whole(1), "Sequences to evaluate, from the end of the text.", default_text="all"
    )
    limit: int | None = option(None, kinds.whole(1), "Questions of each zero-shot task.", default_text="all")
    packed: bool = option(
        True,
        kinds.switch(),
        "Whether quantized weights stay packed, as they are served, or are expanded to dense ones first.",
        flag="--packed/--expanded",
    )
    device: str = same(RunConfig, "device")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = same(
        RunConfig,
        "dtype",
        help="Data type of activations, of quantized and unquantized models alike. auto: the checkpoint's, or float32 "
        "on a CPU.",
    )
    trust_remote_code: bool = same(RunConfig, "trust_remote_code")


COMPARE: tuple[type[Config], ...] = (ComparisonConfig, MeasureConfig)
"""The configurations of `sarqc compare`."""
EVALUATE: tuple[type[Config], ...] = (EvaluationConfig,)
"""The configuration of `sarqc eval`."""

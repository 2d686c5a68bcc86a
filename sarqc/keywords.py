"""Keywords of public functions, for editors and type checkers. Written by `make keywords`; do not edit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor


class QuantKeywords(TypedDict, total=False):
    """Fields of `QuantConfig`."""

    bits: int
    group_size: int | Literal["auto"]
    sym: bool
    ignore: Sequence[str]
    include: Sequence[str]
    embedding_bits: int | None
    avg_bits: float | None
    bit_options: Sequence[int]
    format: str
    tp: int | None


class MethodKeywords(TypedDict, total=False):
    """Fields of `MethodConfig`."""

    effort: Literal["fast", "default", "best"]
    reg_lambda: float | Literal["auto", "prior"]
    saliency: str
    cd_passes: int
    error_correction: bool
    expert_shrinkage: float
    router_weight_power: int
    scales: Literal["minmax", "search"]
    act_order: Literal["none", "static", "group"]
    damp: float


class CalibrationKeywords(TypedDict, total=False):
    """Fields of `CalibrationConfig`."""

    dataset: str | Path | Tensor | Sequence[Any]
    num_samples: int | None
    seqlen: int | None
    column: str | None
    seed: int


class RunKeywords(TypedDict, total=False):
    """Fields of `RunConfig`."""

    device: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    micro_batch: int | None
    gram_budget: int
    activation_budget: int | None
    work_dir: str | Path | None
    resume: bool
    overwrite: bool
    ordered: bool
    trust_remote_code: bool


class ComparisonKeywords(TypedDict, total=False):
    """Fields of `ComparisonConfig`."""

    methods: Sequence[str]
    bits: Sequence[int]
    group_sizes: Sequence[int | Literal["auto"]]
    sym: bool
    ignore: Sequence[str]
    dataset: str | Path | Tensor | Sequence[Any]
    num_samples: Sequence[int]
    seqlen: int | None
    seeds: Sequence[int]
    device: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    trust_remote_code: bool


class MeasureKeywords(TypedDict, total=False):
    """Fields of `MeasureConfig`."""

    texts: Sequence[str]
    eval_seqlen: int | None
    eval_windows: int
    column: str | None
    also: Sequence[Any]


class EvaluationKeywords(TypedDict, total=False):
    """Fields of `EvaluationConfig`."""

    text: str
    column: str | None
    seqlen: int | None
    max_windows: int | None
    limit: int | None
    packed: bool
    device: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    trust_remote_code: bool


class QuantizeKeywords(QuantKeywords, MethodKeywords, CalibrationKeywords, RunKeywords):
    """Keywords of `sarqc.quantize`."""


class CompareKeywords(ComparisonKeywords, MeasureKeywords):
    """Keywords of `sarqc.compare`."""

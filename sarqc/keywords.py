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
    """Bits per weight. Default: 4."""
    group_size: int | Literal["auto"]
    """Inputs that share one scale. -1: one scale per output row. auto: the largest of 128, 64, 32 that divides the
    inputs of every layer. Default: auto."""
    sym: bool
    """Symmetric: the zero point is the middle code. Asymmetric: each group stores a zero point. Default: on."""
    ignore: Sequence[str]
    """Regular expression; Linears whose names match stay unquantized. Default: none."""
    avg_bits: float | None
    """Average bits per weight, scales included, in place of bits: each layer gets a width by its sensitivity.
    Default: not set."""
    bit_options: Sequence[int]
    """Bit-widths that avg_bits chooses from. Marlin kernels run 4,8. Default: 2,3,4,5,6,8."""
    format: str
    """Checkpoint format: compressed-tensors (vLLM, SGLang and transformers load it), gptq, gptq_v2 or awq. Default:
    compressed-tensors."""
    tp: int | None
    """Tensor-parallel size for serving; the run fails at the start if no runtime supports it. Default: not
    checked."""


class MethodKeywords(TypedDict, total=False):
    """Fields of `MethodConfig`."""

    reg_lambda: float | Literal["auto"]
    """Regularisation lambda, relative to the mean of diag(H). auto: chosen on held-out calibration data. Default:
    auto; 0 for rtn-search, awq; 0.01 for gptq."""
    saliency: str
    """Weight of each input channel in the regulariser: iso, abs, rms, energy (diag(H)) or power:A (diag(H)^A).
    Default: energy; iso for rtn-search, awq, rqc-awq, gptq, rqc-gptq."""
    cd_passes: int
    """Passes of coordinate descent over codes and scales after GPTQ. Each takes about half as long as GPTQ.
    Default: 0; 2 for rqc-gptq, sarqc-gptq, sarqc-awq-gptq."""
    error_correction: bool
    """Residual error correction: layers that write to the residual stream compensate the error before them, as far
    as held-out data supports it. Doubles the forward passes. Default: off; on for sarqc-gptq, sarqc-awq-gptq."""
    expert_shrinkage: float
    """Shrinkage of each expert's Hessian to the pooled Hessian of its layer, in pooled rows per input channel.
    Default: 0.25; 0 for rtn-search, awq, gptq."""
    router_weight_power: int
    """Power of the router weight by which a token counts in an expert's Hessian. 2 is least squares of the layer
    output. Default: 0."""
    scales: Literal["minmax", "search"]
    """Scales of groups: from minimum and maximum, or by MSE search. Default: search; minmax for rtn, gptq."""
    act_order: Literal["none", "static", "group"]
    """Column order of GPTQ: none, static (by diag(H), scales fixed before) or group (group-aware reordering). None
    of them stores a g_idx. Default: group; static for gptq."""
    damp: float
    """Damping added to the diagonal of the Hessian, relative to its mean (damp_percent / 100). Default: 0.0001; 0
    for gptq."""


class CalibrationKeywords(TypedDict, total=False):
    """Fields of `CalibrationConfig`."""

    dataset: str | Path | Tensor | Sequence[Any]
    """Calibration data: a UTF-8 file, a data set NAME[:CONFIG[:SPLIT]], or builtin (Python's language reference).
    Default: builtin."""
    num_samples: int | None
    """Sequences to calibrate on. Default: 128, or all of a shorter text."""
    seqlen: int | None
    """Tokens per sequence. Default: 2048, or all positions of a shorter model."""
    seed: int
    """Seed of the choice of sequences and of validation rows. Default: 0."""


class RunKeywords(TypedDict, total=False):
    """Fields of `RunConfig`."""

    device: str
    """auto, cpu, cuda or cuda:N. Default: auto."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    """Data type of activations. auto: the checkpoint's, or float32 on a CPU that is not fast in bfloat16. Default:
    auto."""
    micro_batch: int | None
    """Sequences in one forward pass. Default: as many as hold 1024 tokens on a CPU, 8192 on a GPU."""
    gram_budget: int
    """Memory for Gram matrices. Experts beyond it are summed in further portions. Default: 16 GB. In bytes."""
    activation_budget: int | None
    """Memory for hidden states. Beyond it they are offloaded to a file in the work folder. Default: a quarter of
    this machine's memory. In bytes."""
    work_dir: str | Path | None
    """Folder for finished blocks. Default: a hidden folder beside the output."""
    resume: bool
    """Resume from finished blocks in the work folder. Default: on."""
    overwrite: bool
    """Replace the output folder once the new one is complete. Default: off."""
    ordered: bool
    """Deterministic reduction: results of several ranks match a single process bit for bit. Default: off."""
    trust_remote_code: bool
    """Run Python code that comes with the model. Off: such models are refused. Default: off."""


class ComparisonKeywords(TypedDict, total=False):
    """Fields of `ComparisonConfig`."""

    methods: Sequence[str]
    """Methods; NAME@0.3 is a method at that fixed reg_lambda. Default: rtn,gptq,sarqc-gptq."""
    bits: Sequence[int]
    """Bit-widths. Default: 4,3."""
    group_sizes: Sequence[int | Literal["auto"]]
    """Group sizes; -1: one scale per output row. Default: auto."""
    sym: bool
    """Symmetric: the zero point is the middle code. Asymmetric: each group stores a zero point. Default: on."""
    ignore: Sequence[str]
    """Regular expression; Linears whose names match stay unquantized. Default: none."""
    dataset: str | Path | Tensor | Sequence[Any]
    """Calibration data: a UTF-8 file, a data set NAME[:CONFIG[:SPLIT]], or builtin (Python's language reference).
    Default: builtin."""
    num_samples: Sequence[int]
    """Numbers of calibration sequences. Default: 16."""
    seqlen: int
    """Tokens per sequence. Default: 512."""
    seeds: Sequence[int]
    """Seeds of the choice of sequences. Default: 0."""
    device: str
    """auto, cpu, cuda or cuda:N. Default: auto."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    """Data type of activations. auto: the checkpoint's, or float32 on a CPU that is not fast in bfloat16. Default:
    auto."""
    trust_remote_code: bool
    """Run Python code that comes with the model. Off: such models are refused. Default: off."""


class MeasureKeywords(TypedDict, total=False):
    """Fields of `MeasureConfig`."""

    texts: Sequence[str]
    """Evaluation data, as --dataset. Repeatable. Default: builtin."""
    eval_seqlen: int
    """Tokens per evaluation sequence. Default: 512."""
    eval_windows: int
    """Evaluation sequences: the last of each text, or all of a shorter one. Default: 16."""
    also: Sequence[Any]
    """Checkpoint of another tool, METHOD:BITS:GROUP:SEQUENCES:SEED=FOLDER. Repeatable. Default: none."""


class EvaluationKeywords(TypedDict, total=False):
    """Fields of `EvaluationConfig`."""

    text: str
    """Evaluation data: a UTF-8 file, a data set NAME[:CONFIG[:SPLIT]], or builtin (not the calibration topics).
    Default: builtin."""
    seqlen: int
    """Tokens per sequence; sequences do not overlap. Default: 512."""
    max_windows: int | None
    """Sequences: the last of the text. Default: all."""
    limit: int | None
    """Questions of each zero-shot task. Default: all."""
    packed: bool
    """Whether quantized weights stay packed, as they are served, or are expanded to dense ones first. Default:
    on."""
    device: str
    """auto, cpu, cuda or cuda:N. Default: auto."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    """Data type of activations. auto: the checkpoint's, or float32 on a CPU where no weights are packed. Default:
    auto."""
    trust_remote_code: bool
    """Run Python code that comes with the model. Off: such models are refused. Default: off."""


class QuantizeKeywords(QuantKeywords, MethodKeywords, CalibrationKeywords, RunKeywords):
    """Keywords of `sarqc.quantize`."""


class CompareKeywords(ComparisonKeywords, MeasureKeywords):
    """Keywords of `sarqc.compare`."""

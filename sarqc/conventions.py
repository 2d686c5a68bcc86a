"""Names that Hugging Face checkpoints and the servers that read them agree on, for every room that has to know them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MatrixSlice:
    """A matrix that lies in a tensor of several, or is stored transposed.

    It is rows start, start + step, ... of matrix `expert` of `tensor`, of its transpose where `transposed`.
    expert: None where the tensor is one matrix. shape: (rows, inputs). row: its first row in the parameter of the
    model, once that is taken apart.
    """

    tensor: str
    expert: int | None
    start: int
    step: int
    shape: tuple[int, int]
    transposed: bool
    row: int


def star(name: str) -> str:
    """The name of a layer or a tensor with * for every number."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""Names of dtypes in a header, in the library's order. Those of less than a byte are not read: no torch dtype has
their shapes."""

LOW_PRECISION = ("fp8", "mxfp4", "modelopt", "fbgemm_fp8")
"""`quant_method` of weights in low precision that are expanded when they are read."""

SOURCE_METHODS = (*LOW_PRECISION, "compressed-tensors", "gptq", "awq")
"""`quant_method` of models that can be quantized: what is quantized already is expanded first."""

SIDE_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.model",  # sentencepiece
    "*.tiktoken",
    "tekken.json",
    "special_tokens_map*",
    "added_tokens*",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "*processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "License*",
    "license*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files beside the weights that make a checkpoint usable: glob patterns."""

FUSED_NAMES: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Linears that servers fuse into one matrix, by the name that they give it."""

FUSED = (*FUSED_NAMES.values(), ("w1", "w3"))
"""Linears that servers fuse into one matrix: quantized alike or not at all."""

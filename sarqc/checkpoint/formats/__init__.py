"""How quantized weights lie on disk: the table of formats, and which of them a checkpoint is in.

A format is functions on small dicts of tensors; it opens no file. A new one is a new file here and a line in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sarqc.checkpoint.formats.awq import Awq
from sarqc.checkpoint.formats.base import Format
from sarqc.checkpoint.formats.compressed_tensors import CompressedTensors
from sarqc.checkpoint.formats.gptq import Gptq
from sarqc.checkpoint.formats.mlx import Mlx
from sarqc.errors import CheckpointError

__all__ = ["FORMATS", "NEUTRAL", "Format", "detect", "quantization_of"]

_TABLE: tuple[Format, ...] = (CompressedTensors(), Gptq("gptq"), Gptq("gptq_v2"), Awq(), Mlx())

FORMATS: dict[str, Format] = {known.name: known for known in _TABLE}
"""Formats by the name that --format gives them. `gptq` writes version 1 for symmetric weights and 2 for others."""
NEUTRAL = FORMATS["compressed-tensors"]
"""The format of finished blocks: it holds whatever a run can make."""


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `quantization_config` of a config.json; empty for a model that is not quantized."""
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise CheckpointError(f"quantization_config in config.json is {quantization!r}, where an object is expected")
    return quantization


def detect(config: Mapping[str, Any]) -> Format | None:
    """The format of the checkpoint whose config.json is `config`; None if it is not quantized, or in no known one."""
    quantization = quantization_of(config)
    return next((known for known in FORMATS.values() if known.detects(quantization)), None)

"""A checkpoint as a model that runs, quantized or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sarqc.checkpoint.reader import open_checkpoint
from sarqc.model import build
from sarqc.model.hub import locate
from sarqc.model.lazy_model import LazyModel
from sarqc.model.tokenizer import load_tokenizer
from sarqc.system import resolve_device, resolve_dtype


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    packed: bool = True,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A checkpoint as a transformers model that runs, and its tokenizer.

    Args:
        model: Folder, hub id, or "smollm2"; a checkpoint that `quantize` wrote or one that is not quantized.
        device: auto, cpu, cuda or cuda:N.
        dtype: Of activations and unquantized weights: auto, float32, bfloat16 or float16. auto: the checkpoint's, or
            float32 on a CPU where no weights are packed. On a CPU float32 is faster for dense products, 16 bits for
            packed ones.
        packed: Keep quantized weights packed in memory and multiply with them. False: expand them to `dtype` once.
        trust_remote_code: Run Python code that comes with the model.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        ArgumentError: A device or a dtype that is not known.
        SarqcError: A checkpoint that is damaged, missing or not supported.
    """
    folder = locate(model, trust_remote_code=trust_remote_code)
    checkpoint = open_checkpoint(folder)
    lazy = LazyModel.from_folder(folder, checkpoint, trust_remote_code=trust_remote_code)
    target = resolve_device(device)
    as_stored = dtype == "auto" and packed and checkpoint.format is not None
    wanted = lazy.dtype if as_stored else resolve_dtype(dtype, target, lazy.dtype)
    built = build.build(lazy, checkpoint, device=target, dtype=wanted, packed=packed)
    return built, load_tokenizer(folder, trust_remote_code=trust_remote_code)

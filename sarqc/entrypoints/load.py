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
    """The model and its tokenizer.

    model: folder, hub id or `smollm2`; a checkpoint that `quantize` wrote or an ordinary one. packed: keep quantized
    weights packed in memory and multiply with them as they are; False expands them to `dtype` once. dtype: of
    activations and unquantized weights; "auto" is the checkpoint's, but float32 on a CPU where nothing is packed: there
    that is the fast one for dense products, and 16 bits the fast one for packed ones. Returns a transformers model in
    eval mode and its tokenizer.
    """
    folder = locate(model, trust_remote_code=trust_remote_code)
    checkpoint = open_checkpoint(folder)
    lazy = LazyModel.from_folder(folder, checkpoint, trust_remote_code=trust_remote_code)
    target = resolve_device(device)
    as_stored = dtype == "auto" and packed and checkpoint.format is not None
    wanted = lazy.dtype if as_stored else resolve_dtype(dtype, target, lazy.dtype)
    built = build.build(lazy, checkpoint, device=target, dtype=wanted, packed=packed)
    return built, load_tokenizer(folder, trust_remote_code=trust_remote_code)

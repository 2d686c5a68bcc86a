"""A checkpoint as a model that runs, quantized or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sarqc.checkpoint.reader import open_checkpoint
from sarqc.errors import ArgumentError
from sarqc.job.locate import locate
from sarqc.model import inference
from sarqc.model.skeleton import Skeleton
from sarqc.model.tokenizer import load_tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    skeleton = Skeleton.from_folder(folder, checkpoint, trust_remote_code=trust_remote_code)
    target = resolve_device(device)
    as_stored = dtype == "auto" and packed and checkpoint.format is not None
    wanted = skeleton.dtype if as_stored else resolve_dtype(dtype, target, skeleton.dtype)
    built = inference.build(skeleton, checkpoint, device=target, dtype=wanted, packed=packed)
    return built, load_tokenizer(folder, trust_remote_code=trust_remote_code)


def resolve_device(device: str) -> torch.device:
    """A device by name; "auto" is the first GPU where there is one. `ArgumentError` where it cannot be used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f"device = {device!r} is not known: use auto, cpu, cuda or cuda:N") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"device = {device!r}: this machine has {torch.cuda.device_count()} GPUs; use auto or cpu")
    if resolved.type not in {"cpu", "cuda"}:
        raise ArgumentError(f"device = {device!r} is not supported: use auto, cpu, cuda or cuda:N")
    return resolved


def resolve_dtype(dtype: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """A dtype by name; "auto" is what the checkpoint stores on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else stored
    if dtype not in _DTYPES:
        raise ArgumentError(f"dtype = {dtype!r} is not known: use auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]

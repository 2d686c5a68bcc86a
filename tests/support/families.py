"""Tiny models of the sweep's families, for tests: built once a session, each in a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

import sarqc
from benchmarks.models.build import build
from sarqc.checkpoint.reader import Checkpoint, open_checkpoint
from sarqc.model.lazy_model import LazyModel

TOKENS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(5))


def save(row: str, folder: Path, **changes: Any) -> Path:
    """The tiny model of a row of the sweep."""
    build(row, folder, **changes)
    return folder


def lazy(folder: Path) -> LazyModel:
    """What sarqc makes of a folder."""
    with open_checkpoint(folder) as source:
        return LazyModel.from_folder(folder, source)


def split(folder: Path) -> tuple[LazyModel, Checkpoint]:
    """A folder's model and its source, with every matrix by a name of its own."""
    source = open_checkpoint(folder)
    lazy = LazyModel.from_folder(folder, source)
    return lazy, source.split(lazy.split(lambda names: True))


def rounded(folder: Path, out: Path, **settings: Any) -> Path:
    """The folder's model, RTN to 4 bits."""
    return sarqc.quantize(folder, out, **{"method": "rtn", "bits": 4, "group_size": 32} | settings).out


def logits(folder: Path, row: str = "", **how: Any) -> torch.Tensor:
    """fp32 logits of a folder as transformers loads it; every weight is found."""
    auto = AutoModelForMultimodalLM if row.endswith("+vl") else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **how)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    with torch.inference_mode():
        return model.eval()(input_ids=TOKENS).logits


def ours(folder: Path) -> torch.Tensor:
    """fp32 logits of a folder as sarqc loads it, its weights dense."""
    model, _ = sarqc.load(folder, dtype="float32", packed=False)
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


def apart(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Median over positions of the largest difference, in units of the logits' spread: choices of experts may flip."""
    return ((actual - wanted).abs().amax(-1) / wanted.std()).median().item()

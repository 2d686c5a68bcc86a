"""A row of the sweep: by the default method, in this process, and loaded packed and by transformers alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import sarqc
from tests.support import families

RESULTS = json.loads((Path(__file__).parents[2] / "benchmarks/results/models.json").read_text())["rows"]
SMALL = {"bits": 4, "group_size": 32, "dataset": families.TOKENS, "num_samples": 2}
LOADED = ("works", "reload in transformers fails")
"""Kinds of results that sarqc loads; of the first, transformers loads them alone too."""
TEXT = "llama4+vl"
"""Its head looks for images in transformers 5.24, and fails on text alone, dense or not."""


def loaded(rows: Iterable[str]) -> list[str]:
    """Those of these rows whose results sarqc loads."""
    return [row for row in rows if RESULTS[row]["kind"] in LOADED]


def check(row: str, folder: Path) -> None:
    """As many layers as the sweep counted, and the same logits, however they are loaded."""
    for package in RESULTS[row].get("with", ()):
        pytest.importorskip(package)
    result = sarqc.quantize(families.save(row, folder / "in"), folder / "out", **SMALL)
    assert result.report["targets"]["quantized"] == RESULTS[row]["linears"]
    packed, _ = sarqc.load(result.out, dtype="float32")
    if row == TEXT:
        return
    with torch.inference_mode():
        actual = packed(input_ids=families.TOKENS).logits
    alone = RESULTS[row]["kind"] == "works"
    expected = families.logits(result.out, row) if alone else families.ours(result.out)
    assert families.apart(actual, expected) < 0.1  # products of packed weights round activations to bf16 here

"""The sweep's first part: the models that people use most and the conditions of published checkpoints, one after the
other in this process, by the default method. The whole sweep gives each stage a process: `make models`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sarqc
from benchmarks.models import rows
from tests.support import families

RESULTS = json.loads((Path(__file__).parents[2] / "benchmarks/results/models.json").read_text())["rows"]
SMALL = {"bits": 4, "group_size": 32, "num_samples": 2, "seqlen": 16}
LOADED = ("works", "reload in transformers fails")
"""Kinds of results that sarqc loads; of the first, transformers loads them alone too."""
TEXT = "llama4+vl"
"""Its head looks for images in transformers 5.24, and fails on text alone, dense or not."""


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in rows.FIRST + rows.CONDITIONS if RESULTS[row]["kind"] in LOADED])
def test_a_row_is_quantized_and_loads_to_the_same(row, tmp_path):
    for package in RESULTS[row].get("with", ()):
        pytest.importorskip(package)
    result = sarqc.quantize(families.save(row, tmp_path / "in"), tmp_path / "out", **SMALL)
    assert result.report["targets"]["quantized"] == RESULTS[row]["linears"]
    packed, _ = sarqc.load(result.out, dtype="float32")
    if row == TEXT:
        return
    with torch.inference_mode():
        actual = packed(input_ids=families.TOKENS).logits
    alone = RESULTS[row]["kind"] == "works"
    expected = families.logits(result.out, row) if alone else families.ours(result.out)
    assert families.apart(actual, expected) < 0.1  # products of packed weights round activations to bf16 here

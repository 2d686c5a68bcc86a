"""`sarqc models`: the packaged table, a filter, and what the class of a model gets."""

from __future__ import annotations

import json

import pytest

from sarqc.entrypoints.models import models
from sarqc.errors import ArgumentError, ModelError


def test_a_word_finds_names_and_classes():
    everything = models()["rows"]
    assert len(everything) > 100 and {"name", "class", "result", "layers", "left"} <= everything[0].keys()
    names = {row["name"] for row in models("Qwen3Moe")["rows"]}
    assert "qwen3_moe" in names and "llama" not in names
    with pytest.raises(ArgumentError, match="word = 'no such model'"):
        models("no such model")


def test_a_row_says_what_is_quantized_or_why_not():
    (row,) = [row for row in models("qwen3_moe")["rows"] if row["name"] == "qwen3_moe"]
    assert {"self_attn.q_proj", "mlp.experts.*.gate_proj"} <= set(row["layers"]) and row["left"]
    for row in models()["rows"]:
        assert row["result"].startswith(("works", "reload")) or row["reason"], row["name"]


def test_a_folder_gets_the_rows_of_its_class(tmp_path):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = models(str(tmp_path))["rows"]
    (row,) = [row for row in rows if row["name"] == "llama"]
    assert {one["class"] for one in rows} == {"LlamaForCausalLM"} and "self_attn.q_proj" in row["layers"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSomethingElse"]}))
    with pytest.raises(ArgumentError, match="LlamaForSomethingElse"):
        models(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError):
        models(str(tmp_path))

"""Adapters of other tools: what can be tried without them."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file

from benchmarks.rivals.llmcompressor_oneshot import name_experts


def test_experts_of_a_mixtral_get_their_own_names_and_nothing_else_does(tmp_path):
    expert, dense = "model.layers.3.block_sparse_moe.experts.12", "model.layers.3.mlp.up_proj.weight"
    saved = {
        f"{expert}.{name}.weight_scale": torch.full((2,), i)
        for i, name in enumerate(("gate_proj", "up_proj", "down_proj"))
    }
    save_file(saved | {dense: torch.zeros(1)}, tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys([*saved, dense], "model.safetensors")}))
    name_experts(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert set(tensors) == {dense, *(f"{expert}.{name}.weight_scale" for name in ("w1", "w2", "w3"))}
    assert [int(tensors[f"{expert}.{name}.weight_scale"][0]) for name in ("w1", "w3", "w2")] == [0, 1, 2]
    assert json.loads(index.read_text())["weight_map"].keys() == tensors.keys()

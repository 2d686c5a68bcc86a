"""What is left unquantized: said with its reason, refused where it is too much, and written so that readers find it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sarqc
from sarqc.config import QuantConfig
from sarqc.errors import ModelError
from sarqc.model.layers import targets
from tests.support import families

QUANT = QuantConfig(group_size=32)


@pytest.mark.parametrize("row", ["dbrx"])
def test_a_refusal_names_the_pattern_that_lets_the_rest_run(row, tmp_path):
    """Weights that are no Linears are refused; with the pattern from the message the run ends well."""
    source = families.save(row, tmp_path / "in")
    with pytest.raises(ModelError, match=r"cannot be quantized: .* \d+% of the weights") as refusal:
        families.rounded(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    advised = re.search(r"--ignore '(.*)'$", str(refusal.value))
    assert advised is not None
    out = families.rounded(source, tmp_path / "out", ignore=(advised[1],))
    assert families.apart(families.logits(out), families.ours(out)) < 0.05
    kept = load_file(out / "model.safetensors")
    for name, tensor in load_file(source / "model.safetensors").items():
        if re.search(advised[1], name.removesuffix(".weight")):
            assert torch.equal(kept[name], tensor)


@pytest.mark.parametrize("row", ["gpt_neox", "phimoe"])
def test_readers_find_what_is_left_under_either_name(row, tmp_path):
    """The checkpoint's names differ from those of transformers, which matches its own."""
    out = families.rounded(families.save(row, tmp_path / "in"), tmp_path / "out")
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    own, stored = {"gpt_neox": ("lm_head", "embed_out"), "phimoe": ("lm_head", "lm_head")}[row]
    assert {own, stored} <= set(ignored)
    assert families.apart(families.logits(out), families.ours(out)) < 0.05


@pytest.mark.parametrize("row", ["ctrl", "gptj", "codegen"])
def test_packed_layers_stand_in_their_place(row, tmp_path, registered):
    """A Sequential keeps its order, and a module with packed layers still fills buffers of its own."""
    out = families.rounded(families.save(row, tmp_path / "in"), tmp_path / "out")
    wanted = families.ours(out)
    assert families.apart(families.logits(out), wanted) < 0.05
    model, _ = sarqc.load(out, dtype="float32", packed=True)
    with torch.inference_mode():
        assert families.apart(model(input_ids=families.TOKENS).logits, wanted) < 0.05


def test_routers_and_indexes_are_left_and_said(tmp_path):
    selected = targets(families.lazy(families.save("deepseek_v32", tmp_path)), QUANT)
    left = {re.sub(r".*\.\d+\.", "", name): reason for name, reason in selected.left}
    assert {"self_attn.indexer.weights_proj", "self_attn.indexer.wk", "self_attn.indexer.wq_b"} <= left.keys()
    assert all("choose" in reason for reason in left.values())
    assert not any("indexer" in name or name.endswith("mlp.gate") for name in selected.linears)


def test_narrow_layers_are_left_by_rule(tiny):
    lazy = tiny("llama").lazy()
    selected = targets(lazy, QUANT)
    lazy.blocks[0].mlp.down_proj = nn.Linear(16, 64, bias=False)
    left = targets(lazy, QUANT)
    assert set(selected.linears) - set(left.linears) == {"model.layers.0.mlp.down_proj"}
    assert dict(left.left) == {"model.layers.0.mlp.down_proj": "it has fewer than 32 inputs"}


@pytest.mark.parametrize(
    ("row", "layer", "reason"),
    [
        ("bart", "encoder_attn.", "text does not pass"),
        ("ernie4_5_vl_moe+vl", "experts.4.", "text does not pass"),
        ("deepseek_v4", "attn.wo_a", "block-diagonal"),
    ],
)
def test_what_no_packed_linear_can_stand_for_is_left_and_said(row, layer, reason, tmp_path):
    selected = targets(families.lazy(families.save(row, tmp_path)), QUANT)
    left = {name: why for name, why in selected.left if layer in name}
    assert left and all(reason in why for why in left.values())
    assert not any(layer in name for name in selected.linears)


def test_a_model_that_rescales_its_weights_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ModelError, match=r"changes rwkv\.blocks\.0\.attention\.output\.weight in its forward"):
        targets(families.lazy(families.save("rwkv", tmp_path)), QUANT)


def test_a_model_that_mixes_dtypes_is_refused_with_one_that_runs(tmp_path):
    source, how = families.save("xlstm", tmp_path / "in"), {"num_samples": 4, "seqlen": 32, "method": "gptq"}
    with pytest.raises(ModelError, match=r"the same dtype.*try --dtype float32"):
        families.rounded(source, tmp_path / "out", dtype="bfloat16", **how)
    assert families.rounded(source, tmp_path / "out", dtype="float32", **how).is_dir()


def test_a_layer_is_passed_where_its_like_is(tiny):
    """Without data one of several experts is called, and one branch of two: its like stand for it."""
    lazy = tiny("llama").lazy()
    touched = lazy.usage.touched
    lazy.usage = replace(lazy.usage, touched=touched - {"model.layers.0.mlp.up_proj.weight"})
    assert not targets(lazy, QUANT).left
    lazy.usage = replace(lazy.usage, touched=frozenset(name for name in touched if "up_proj" not in name))
    assert {name.rpartition(".")[2] for name, _ in targets(lazy, QUANT).left} == {"up_proj"}


def test_patterns_find_either_name(tmp_path):
    lazy = families.lazy(families.save("phimoe", tmp_path))
    stored = targets(lazy, QuantConfig(group_size=32, ignore=(r"block_sparse_moe\.experts",)))
    own = targets(lazy, QuantConfig(group_size=32, ignore=(r"mlp\.experts",)))
    assert [name for name, _ in own.ignored] == [name for name, _ in stored.ignored] != []

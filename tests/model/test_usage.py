"""What weights are for, seen without data: routers and the parts of an index, and nothing else, are selectors."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from benchmarks.models.build import model_class, tiny_config
from sarqc.model import moe
from sarqc.model.usage import usage

INDEX = ["indexer.weights_proj.weight", "indexer.wk.weight", "indexer.wq_b.weight"]
SELECTORS = {
    "llama": [],
    "qwen3_moe": ["mlp.gate.weight"],
    "gpt_oss": ["mlp.router.weight"],
    "hunyuan_v1_moe": ["mlp.gate.wg.weight"],
    "dbrx": ["ffn.router.layer.weight"],
    "gemma4_text@moe": ["router.proj.weight"],
    "phimoe": ["mlp.router.weight"],  # which takes maxima
    "zaya": [
        "mlp.gate.down_proj.weight",
        *(f"mlp.gate.router_mlp.{name}.weight" for name in ("fc1", "fc2", "out_proj")),
    ],
    "deepseek_v32": ["mlp.gate.weight", *(f"self_attn.{name}" for name in INDEX)],
}


def built(row):
    from benchmarks.models.rows import VARIANTS

    config = tiny_config(row.partition("@")[0], VARIANTS.get(row))
    with torch.device("meta"):
        model = model_class(row).from_config(config).eval()
    moe.use_sorted_experts(model)
    return model


@pytest.mark.parametrize("row", SELECTORS)
def test_selectors_are_found_by_what_they_do(row):
    observed = usage(built(row))
    assert observed is not None
    inside = {re.sub(r".*?\.\d+\.", "", name, count=1) for name in observed.selectors}
    assert sorted(inside) == sorted(SELECTORS[row])
    assert {"lm_head.weight", "model.embed_tokens.weight"} & observed.multiplied  # tied in some


def test_a_weight_that_other_code_multiplies_is_not_called():
    observed = usage(built("jamba"))
    assert observed is not None
    bypassed = {name for name in observed.multiplied if name.endswith("dt_proj.weight")}
    assert bypassed and not {name.removesuffix(".weight") for name in bypassed} & observed.called.keys()


def test_a_tower_is_not_touched_by_text():
    from transformers import Gemma3ForConditionalGeneration

    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration._from_config(tiny_config("gemma3")).eval()
    observed = usage(model)
    assert observed is not None
    assert not any("vision" in name or "projector" in name for name in observed.touched)
    assert any("language_model" in name for name in observed.touched)


class SparseAttention(nn.Module):
    """Queries and keys that choose positions and also attend: no selectors. `score` scales what is chosen from: one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(16, 16, bias=False))
        self.score = nn.Linear(16, 1, bias=False)

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        chosen = (scores * self.score(x)).topk(4, -1).indices
        kept = torch.full_like(scores, -1e9).scatter(-1, chosen, 0.0)
        return self.o((scores + kept).softmax(-1) @ self.v(x))


def test_queries_that_also_attend_are_no_selectors():
    with torch.device("meta"):
        observed = usage(SparseAttention())
    assert observed is not None and observed.selectors == {"score.weight"}


def test_code_that_needs_data_is_admitted():
    class Curious(SparseAttention):
        def forward(self, input_ids, use_cache=False):
            return super().forward(input_ids[input_ids > 3].view(1, -1))

    with torch.device("meta"):
        assert usage(Curious()) is None


def test_weights_that_a_forward_writes_to_are_changed():
    class Rescaled(SparseAttention):
        def forward(self, input_ids, use_cache=False):
            self.o.weight.div_(2)
            return super().forward(input_ids)

    with torch.device("meta"):
        plain, rescaled = usage(SparseAttention()), usage(Rescaled())
    assert plain is not None and not plain.changed
    assert rescaled is not None and rescaled.changed == {"o.weight"}


@pytest.mark.parametrize("row", ["gptj", "codegen"])
def test_tables_that_follow_the_inputs_stay_where_they_are(row):
    model = built(row)
    tables = [module for module in model.modules() if "embed_positions" in module._buffers]
    for module in tables:
        module._buffers["embed_positions"] = torch.zeros_like(module.embed_positions, device="cpu")
    assert usage(model) is not None
    assert tables and all(module.embed_positions.device.type == "cpu" for module in tables)

"""Experts that a checkpoint stores in one tensor: shown one by one, quantized, and read back as the same layer."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import sarqc
from benchmarks.models.build import build
from benchmarks.models.conditions import CONDITION
from sarqc.config import QuantConfig
from sarqc.model.build import build as load
from sarqc.model.layers import targets
from tests.support import families

NAMES = {  # row: the first matrix by its own name, and where it is
    "gpt_oss": ("mlp.experts.0.gate_proj", "mlp.experts.gate_up_proj", lambda t: t[0].mT[::2]),
    "granitemoe": (
        "block_sparse_moe.experts.0.w1",
        "block_sparse_moe.input_linear.weight",
        lambda t: t[0][: t.shape[1] // 2],
    ),
    "aria_text": ("mlp.experts.0.w1", "mlp.experts.fc1.weight", lambda t: t[0].mT[: t.shape[2] // 2]),
    "llama4_text": (
        "feed_forward.experts.0.gate_proj",
        "feed_forward.experts.gate_up_proj",
        lambda t: t[0].mT[: t.shape[2] // 2],
    ),
    "inkling2_text": ("mlp.experts.0.w3", "mlp.experts.w13_weight", lambda t: t[0][1::2]),
    "step3p7+vl": ("moe.experts.0.up_proj", "moe.up_proj.weight", lambda t: t[0]),
    "qwen3_vl_moe+vl": ("mlp.experts.0.down_proj", "mlp.experts.down_proj", lambda t: t[0].mT),
    "qwen3_5_moe_text@fused": ("mlp.experts.0.gate_proj", "mlp.experts.gate_up_proj", lambda t: t[0][:64]),
}


def saved(row, folder):
    model = build(row, folder)
    CONDITION.get(row.partition("@")[2], lambda *_: None)(folder, model)
    if row == "qwen3_vl_moe+vl":  # its makers store the transpose, which transformers reads and does not write
        path = folder / "model.safetensors"
        tensors = {k: v.mT.contiguous() if "experts.down" in k else v for k, v in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("row", NAMES)
def test_each_matrix_has_a_name_and_is_what_it_was(row, tmp_path):
    lazy, source = families.split(saved(row, tmp_path))
    single, whole, part = NAMES[row]
    stored = load_file(tmp_path / "model.safetensors")
    fused = next(name for name in stored if name.endswith(whole))
    name = fused.replace(whole, f"{single}.weight")
    assert name in source.names() and fused not in source.names()
    assert torch.equal(source.load(name), part(stored[fused]))
    assert source.shape(name) == tuple(part(stored[fused]).shape) and source.dtype(name) == stored[fused].dtype
    selected = targets(lazy, QuantConfig(group_size=32))
    assert name.removesuffix(".weight") in selected.linears
    assert not any("experts" in left for left, _ in selected.left)


@pytest.mark.parametrize("row", NAMES)
def test_taken_apart_they_compute_the_same(row, tmp_path):
    """Transposed, interleaved and biased: as transformers computes with the whole tensor."""
    wanted = families.logits(saved(row, tmp_path), row)
    lazy, source = families.split(tmp_path)
    model = load(lazy, source, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=families.TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row", ["gpt_oss", "granitemoe", "inkling2_text", "llama4_text", "step3p7+vl"])
def test_a_quantized_model_is_read_back_packed(row, tmp_path, registered):
    source = saved(row, tmp_path / "in")
    out = families.rounded(source, tmp_path / "out", bits=8)
    wanted = families.ours(out)
    for actual in (families.logits(out, row), wanted):
        for other, least in ((wanted, 0.05), (families.ours(source), 0.2)):
            assert ((actual - other).abs().amax(-1) / other.std()).median() < least
    assert sarqc.verify(out, against=source).sound


def test_names_of_transformers_come_first(tmp_path):
    """Where it reads experts one by one too, the checkpoint loads in transformers alone."""
    out = families.rounded(saved("qwen3_moe@fused", tmp_path / "in"), tmp_path / "out")
    wanted = families.ours(out)
    assert ((families.logits(out) - wanted).abs().amax(-1) / wanted.std()).median() < 0.05


def test_ignored_experts_stay_whole(tmp_path):
    out = families.rounded(saved("gpt_oss", tmp_path / "in"), tmp_path / "out", ignore=(r"\.experts\.",))
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "in", out))
    experts = [name for name in before if re.search(r"experts\.(gate_up|down)_proj$", name)]
    assert experts and all(torch.equal(before[name], after[name]) for name in experts)

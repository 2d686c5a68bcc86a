"""Matrices that a checkpoint stores transposed, or several in one tensor: each is quantized as a Linear of its own."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import sarqc
from sarqc.entrypoints.verify import verify
from sarqc.model.transposed import is_transposed
from tests.support import families

PIECES = {  # row: a stored tensor, and the layers that it holds, in order
    "hrm_text": (
        "model.L_module.layers.0.attn.gqkv_proj",
        [f"model.L_module.layers.0.self_attn.{name}_proj" for name in ("gate", "q", "k", "v")],
    ),
    "molmo2+vl": (
        "model.transformer.blocks.0.self_attn.att_proj",
        [f"model.transformer.blocks.0.self_attn.{name}_proj" for name in ("q", "k", "v")],
    ),
}


@pytest.mark.parametrize("row", PIECES)
def test_a_tensor_of_several_layers_is_cut_into_them(row, tmp_path):
    lazy, source = families.split(families.save(row, tmp_path))
    stored, pieces = PIECES[row]
    names = [f"{piece}.weight" for piece in pieces]
    whole = load_file(tmp_path / "model.safetensors")[f"{stored}.weight"]
    assert torch.equal(torch.cat([source.load(name) for name in names]), whole)
    assert f"{stored}.weight" not in source.names()
    assert {slices[0].name for slices in lazy.slices.values() if slices[0].is_whole} >= set(names)


@pytest.mark.parametrize("row", ["gpt2", "hrm_text"])
def test_it_reloads_to_what_it_was_quantized_to(row, tmp_path, registered):
    """With one kind of layer left as it is stored."""
    source = families.save(row, tmp_path / "in")
    out = families.rounded(source, tmp_path / "out", ignore=(r"\.mlp\.c_proj$|\.o_proj$",))
    assert verify(out, against=source).sound
    wanted = families.ours(out)
    model, _ = sarqc.load(out, dtype="float32", packed=True)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=families.TOKENS).logits, wanted, atol=0.02, rtol=0.02)
    original = families.logits(source)
    assert 0 < (wanted - original).norm() < 0.5 * original.norm()
    torch.testing.assert_close(families.logits(out), wanted, atol=0.02, rtol=0.02)


def test_only_a_product_from_the_other_side_is_transposed():
    class Scaled(Conv1D):
        def forward(self, x):
            return 2 * super().forward(x)

    assert is_transposed(Conv1D(8, 8)) and is_transposed(Conv1D(12, 8))
    assert not any(map(is_transposed, (nn.Linear(8, 8), nn.Embedding(8, 8), nn.LayerNorm(8), Scaled(8, 8))))

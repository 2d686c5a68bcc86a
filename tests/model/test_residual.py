"""Which layers write to the residual stream as it is, and where what they wrote is read first, by kind of block."""

from __future__ import annotations

import pytest
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import sarqc
from sarqc.model.residual import residual_writes
from sarqc.pipeline import block
from tests.support import families

SMALL = {"bits": 4, "group_size": 32, "num_samples": 2, "seqlen": 16}
ATTENTION = {"self_attn.o_proj": "post_attention_layernorm"}


@pytest.mark.parametrize(
    ("row", "changes", "expected"),
    [
        pytest.param("llama", {}, ATTENTION | {"mlp.down_proj": None}, id="one after the other"),
        pytest.param("qwen3_moe", {}, ATTENTION, id="experts, weighted by token"),
        pytest.param("phi", {}, {"mlp.fc2": None}, id="side by side: one of two writers"),
        pytest.param("cohere2", {}, {"mlp.down_proj": None}, id="side by side, without biases"),
        pytest.param("gemma2", {}, {}, id="a norm behind each layer"),
        pytest.param("granite", {"residual_multiplier": 0.5}, {}, id="a factor behind each layer"),
    ],
)
def test_writers_are_found_by_what_they_do(row, changes, expected, tmp_path, monkeypatch):
    found = {}

    def recorded(lazy, index, *args, **options):
        writes = residual_writes(lazy, index, *args, **options)
        inside = f"{lazy.prefix}.{index}."
        found[index] = {
            name.removeprefix(inside): write.reader and write.reader.removeprefix(inside)
            for name, write in writes.items()
        }
        return writes

    monkeypatch.setattr(block, "residual_writes", recorded)
    sarqc.quantize(families.save(row, tmp_path / "in", **changes), tmp_path / "out", **SMALL)
    assert found[0] == expected


def test_a_sum_that_is_made_twice_is_not_the_stream(tmp_path, monkeypatch):
    """What reads the first one is not all that the output reaches: a correction there would be lost behind it."""

    def forward(self, hidden_states, **others):
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **others)[0]
        read = hidden_states + attended
        return hidden_states + attended + self.mlp(self.post_attention_layernorm(read))

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    found = []

    def recorded(*args, **options):
        found.append(residual_writes(*args, **options))
        return found[-1]

    monkeypatch.setattr(block, "residual_writes", recorded)
    sarqc.quantize(families.save("llama", tmp_path / "in"), tmp_path / "out", **SMALL)
    assert [write.reader for write in found[0].values()] == [None]

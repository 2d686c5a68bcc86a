"""The stream's tokens are those of a model that reads the whole text for each, whatever it keeps between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, OpenAIGPTConfig, XLMConfig

from sarqc.model.generate import Stream

CONFIGS: dict[str, Any] = {
    "keys and values": LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ),
    "states": MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=1.0),
    "nothing": OpenAIGPTConfig(vocab_size=64, n_embd=32, n_head=2, n_layer=2, n_positions=64),
    "nothing, though it takes a cache": XLMConfig(vocab_size=64, emb_dim=32, n_heads=2, n_layers=2),
}


@torch.inference_mode()
def read_whole(model: Any, text: list[int], count: int) -> list[int]:
    for _ in range(count):
        text = [*text, int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax())]
    return text


@pytest.mark.parametrize("kept", list(CONFIGS))
def test_two_turns_are_those_of_the_whole_text(kept):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kept]).eval()
    model.generation_config.eos_token_id = None
    stream, text = Stream(model), [3, 14, 15, 9, 26, 5]
    for said in ([], [35, 8, 9, 7]):
        text += said
        answer = list(stream.tokens(text, limit=6, temperature=0, generator=torch.Generator()))
        assert len(answer) == 6 and text + answer == read_whole(model, text, 6)
        text += answer

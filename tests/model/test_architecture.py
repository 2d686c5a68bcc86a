"""Which class a configuration stands for, where its blocks are, and what transformers' conversions make."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Gemma3Config, LlamaConfig

from sarqc.config import QuantConfig
from sarqc.errors import ModelError
from sarqc.model.architecture import build_on_meta, find_blocks, language_model, read_config
from sarqc.model.layers import targets
from tests.support import families

QUANT = QuantConfig(group_size=32)


def test_a_class_that_generates_no_text_is_refused():
    for name in ("LlamaForSequenceClassification", "LlamaModel", "SomebodysEncoder"):
        with pytest.raises(ModelError, match=f"{name} is not a language model"):
            language_model(LlamaConfig(architectures=[name]))


@pytest.mark.parametrize("row", ["gemma3+vl", "qwen2_5_vl+vl", "llava+vl"])
def test_the_blocks_of_a_wrapper_are_those_of_its_text(row, tmp_path):
    """Whatever number of layers its tower has."""
    from benchmarks.models.build import model_class, tiny_config

    for depth in (2, 4):
        config = tiny_config(
            row.removesuffix("+vl"), {"vision_config.num_hidden_layers": depth, "vision_config.depth": depth}
        )
        config.architectures = [model_class(row).__name__]
        model = build_on_meta(config, False, torch.bfloat16)
        from sarqc.model.usage import usage

        prefix, blocks = find_blocks(model, lambda model=model: usage(model))
        assert "language_model" in prefix and len(blocks) == 4


def test_towers_projectors_and_heads_stay(tmp_path):
    lazy = families.lazy(families.save("gemma3+vl", tmp_path))
    selected = targets(lazy, QUANT)
    assert isinstance(lazy.model.config, Gemma3Config)
    assert all(".language_model." in target.module for target in selected.selected)
    assert any("vision" in name for name in selected.unquantized)
    linears = {path for path, module in lazy.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears <= {target.module for target in selected.selected} | set(selected.unquantized)


def test_a_tower_is_not_loaded_for_text(tmp_path):
    from sarqc.checkpoint.reader import open_checkpoint
    from sarqc.model.lazy_model import LazyModel

    folder = families.save("gemma3+vl", tmp_path)
    with open_checkpoint(folder) as source:
        lazy = LazyModel.from_folder(folder, source)
        lazy.load_outer(source)
    first, *others = lazy.model.named_parameters()
    there = [name for name, parameter in others if not parameter.is_meta]
    assert not first[1].is_meta  # transformers takes the device of a model from its first parameter
    assert there and not any("vision" in name or "projector" in name for name in there)
    assert any("embed_tokens" in name for name in there)


@pytest.mark.parametrize("row", ["kimi_linear", "minimax_m3_vl+vl"])
def test_what_transformers_converts_is_what_it_loads(row, tmp_path):
    """Concatenated convolutions and shared experts, through its own operations, bit for bit."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    import sarqc

    folder = families.save(row, tmp_path)
    auto = AutoModelForMultimodalLM if row.endswith("+vl") else AutoModelForCausalLM
    wanted = auto.from_pretrained(folder).state_dict()
    model, _ = sarqc.load(folder, dtype="bfloat16")
    state = model.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor), name


def test_a_wrapper_is_quantized_in_its_text_alone(tmp_path, registered):
    source = families.save("qwen3_5+vl", tmp_path / "in")
    (source / "preprocessor_config.json").write_text("{}")
    out = families.rounded(source, tmp_path / "out")
    assert (out / "preprocessor_config.json").exists()
    wanted = families.ours(out)
    packed = families.logits(out, "qwen3_5+vl")
    import sarqc

    sarqc.unregister()
    plain = families.logits(out, "qwen3_5+vl")
    for got in (packed, plain):
        assert ((got - wanted).abs().amax(-1) / wanted.std()).median() < 0.05


def test_an_unknown_type_is_read_as_the_class_it_names(tmp_path):
    values = {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "auto_map": {"AutoConfig": "a.B"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path, trust_remote_code=False).model_type == "deepseek_v3"
    (tmp_path / "config.json").write_text(json.dumps(values | {"architectures": ["NoSuchForCausalLM"]}))
    with pytest.raises(ModelError):
        read_config(tmp_path, trust_remote_code=False)

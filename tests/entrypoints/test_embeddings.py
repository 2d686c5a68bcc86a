"""Quantized embeddings and their readers, and a head that is tied to them: written apart, of any model and format."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import sarqc
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.entrypoints.evaluate import evaluate_and_save
from sarqc.errors import ArgumentError, CheckpointError, Interrupted
from sarqc.method.rtn import quantize_rtn
from sarqc.quant_config import QuantConfig
from tests.support import families, kept, tiny
from tests.support.stopping import Stopping

SMALL = {"num_samples": 2, "seqlen": 32, "group_size": 32}
BOTH = {"include": ["embed_tokens", "lm_head"], **SMALL}
TOKENS = torch.arange(3, 51).reshape(2, 24)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "model", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def result(tied, tmp_path_factory):
    return kept.quantize(tied, tmp_path_factory.mktemp("out") / "out", **BOTH)


def logits(model):
    with torch.inference_mode():
        return model(input_ids=TOKENS, use_cache=False).logits


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_both_are_written_as_two_and_the_config_says_so(tied, result):
    assert config(result.out)["tie_word_embeddings"] is False and config(tied)["tie_word_embeddings"] is True
    (group,) = config(result.out)["quantization_config"]["config_groups"].values()
    assert group["targets"] == ["lm_head", "model.embed_tokens", "Linear"]
    with open_checkpoint(result.out) as checkpoint, open_checkpoint(tied) as original:
        assert "lm_head.weight" not in original.names()
        weight = original.load("model.embed_tokens.weight").float()[None]
        expected = quantize_rtn(weight, QuantConfig(4, 32), "search", torch.bfloat16)
        assert torch.equal(checkpoint.quantized("model.embed_tokens").codes, expected.codes)
        head = checkpoint.quantized("lm_head")
        assert not torch.equal(head.codes, expected.codes)  # it is calibrated
        assert (head.dequantize() - weight).norm() < 0.2 * weight.norm()


def test_it_is_sound_beside_its_original_and_a_changed_head_is_seen(tied, result, tmp_path):
    against = sarqc.verify(result.out, against=tied)
    assert against.sound and {"lm_head.weight", "model.embed_tokens.weight"} <= against.errors.keys()
    other = tiny.save("llama", tmp_path / "other", tie_word_embeddings=True, seed=1)
    assert not sarqc.verify(result.out, against=other).sound


def test_transformers_loads_it_with_sarqc_and_expanded_without(result, registered):
    dense, _ = sarqc.load(result.out, dtype="bfloat16", packed=False)
    ours = AutoModelForCausalLM.from_pretrained(result.out, dtype=torch.bfloat16)
    assert torch.equal(ours.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    assert (logits(ours) - logits(dense)).abs().max() < 0.05 * logits(dense).abs().max()
    sarqc.unregister()
    try:
        how = CompressedTensorsConfig(dequantize=True)
        with pytest.warns(UserWarning, match="dequantize"):
            theirs = AutoModelForCausalLM.from_pretrained(result.out, dtype=torch.bfloat16, quantization_config=how)
    finally:
        sarqc.register()
    assert torch.equal(logits(theirs.eval()), logits(dense))


def test_its_card_says_what_loads_it(result):
    card = (result.out / "README.md").read_text()
    assert "import sarqc  # so that transformers reads it" in card
    assert "alone it does not load quantized embeddings" in card and "--include embed_tokens --include lm_head" in card


def test_a_model_with_an_expanded_embedding_is_not_saved(result, tmp_path, registered):
    model = AutoModelForCausalLM.from_pretrained(result.out, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="serializable"):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("bits", [None, 8])
def test_mlx_holds_it_and_gives_it_back(tied, tmp_path, bits):
    options = BOTH | {"bits": 3, "embedding_bits": bits, "method": "rtn"}
    out = sarqc.quantize(tied, tmp_path / "out", **options).out
    mlx = sarqc.convert(out, tmp_path / "mlx", format="mlx").out
    assert config(mlx)["quantization"]["bits"] == 3
    assert config(mlx)["quantization"].get("model.embed_tokens", {}).get("bits") == bits
    back = sarqc.convert(mlx, tmp_path / "back", format="compressed-tensors").out
    assert config(back)["quantization_config"] == config(out)["quantization_config"]
    assert (back / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    direct = sarqc.quantize(tied, tmp_path / "direct", format="mlx", **options).out
    assert (direct / "model.safetensors").read_bytes() == (mlx / "model.safetensors").read_bytes()


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_other_formats_refuse_it_before_and_after(tied, result, tmp_path, format):
    message = f"'model.embed_tokens' cannot be held by {format}, .* use format compressed-tensors or mlx"
    with pytest.raises(CheckpointError, match=message):
        sarqc.quantize(tied, tmp_path / "out", format=format, **BOTH | {"include": ["embed_tokens"]})
    with pytest.raises(CheckpointError, match=message):
        sarqc.convert(result.out, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_the_preflight_counts_it_and_names_who_loads_it(tied, result, tmp_path):
    preflight = sarqc.estimate(tied, tmp_path / "out", **BOTH)
    assert preflight.sizes.output == result.report["size"]["bytes"]
    assert any("are one tensor of the model, and are written as two" in note for note in preflight.notes)
    runs = {support.server: not support.failures for support in preflight.serve if support.ranks == 1}
    assert runs["vLLM 0.33, sm_90"] and not runs["SGLang 0.5.23"] and not runs["transformers 5.23"]
    assert result.report["serve"]["vLLM 0.33, sm_90"] and not result.report["serve"]["SGLang 0.5.23"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"bits": 3}, "--embedding-bits 2, 4 or 8"), ({"sym": False}, "read as symmetric")],
)
def test_what_vllm_would_read_wrongly_is_said(tied, tmp_path, options, reason):
    preflight = sarqc.estimate(tied, tmp_path / "out", **BOTH | options)
    assert any(reason in line for support in preflight.serve for line in support.failures)
    advised = sarqc.estimate(tied, tmp_path / "out", **BOTH | {"bits": 3, "embedding_bits": 8})
    assert not any(reason in line for support in advised.serve for line in support.failures)


def test_a_head_alone_leaves_the_embedding_as_it_was(tied, tmp_path):
    out = sarqc.quantize(tied, tmp_path / "out", include=["lm_head"], **SMALL).out
    assert not config(out)["tie_word_embeddings"]
    with open_checkpoint(out) as checkpoint, open_checkpoint(tied) as original:
        assert torch.equal(checkpoint.load("model.embed_tokens.weight"), original.load("model.embed_tokens.weight"))
        assert "lm_head" in checkpoint.linears()


def test_a_dense_head_of_its_own_is_said(tied, tmp_path):
    preflight = sarqc.estimate(tied, tmp_path / "out", include=["embed_tokens"], **SMALL)
    assert any("lm_head stays in 16 bits: --include it too" in note for note in preflight.notes)


def test_what_is_ignored_too_leaves_the_model_as_it_is(tied, tmp_path):
    out = sarqc.quantize(tied, tmp_path / "out", ignore=["head", "embed"], **BOTH).out
    assert config(out)["tie_word_embeddings"]
    with open_checkpoint(out) as checkpoint:
        assert "lm_head.weight" not in checkpoint.names() and "model.embed_tokens" not in checkpoint.linears()


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ("gemma3+vl", {"lm_head", "language_model.model.embed_tokens"}),
        ("mistral_large4+vl", {"output", "tok_embeddings"}),
        ("deepseek_v4", {"head", "model.embed_tokens"}),
        ("qwen3@fp8", {"lm_head", "model.embed_tokens"}),
    ],
)
def test_models_of_other_kinds_have_them_under_their_own_names(tmp_path, row, names):
    source = families.save(row, tmp_path / "model")
    include = [r"embed_tokens$", r"^lm_head$"]
    out = sarqc.quantize(source, tmp_path / "out", method="rtn", include=include, embedding_bits=8, group_size=32).out
    with open_checkpoint(out) as checkpoint:
        assert names <= set(checkpoint.linears())
    assert sarqc.verify(out, against=source).sound
    packed, dense = (sarqc.load(out, dtype="float32", packed=packed)[0] for packed in (True, False))
    with torch.inference_mode():
        actual, expected = (model(input_ids=families.TOKENS).logits for model in (packed, dense))
    assert families.apart(actual, expected) < 0.1  # products of packed weights round activations to bf16 here


def test_perplexity_is_measured_with_each_model_s_own(tied, result):
    how = dict(seqlen=48, max_windows=3)
    saved = evaluate_and_save(result.out, **how)
    for key, folder in (("before", tied), ("after", result.out)):
        assert saved.entry[key] == pytest.approx(sarqc.evaluate(folder, packed=False, **how).perplexity, rel=1e-4)


@pytest.mark.parametrize(
    ("include", "message"),
    [((), "has no effect alone: include embeddings too, as 'embed_tokens'"), (("lm_head",), "finds no embedding")],
)
def test_bits_of_nothing_are_refused(tied, tmp_path, include, message):
    with pytest.raises(ArgumentError, match=rf"embedding_bits = 8 .*{message}"):
        sarqc.quantize(tied, tmp_path / "out", embedding_bits=8, include=include, **SMALL)


def test_a_run_stopped_before_it_makes_the_same_bytes(tied, result, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match="stopped after block 3 of 4"):
        sarqc.quantize(tied, out, progress=Stopping(3), **BOTH)
    progress = Stopping()
    sarqc.quantize(tied, out, progress=progress, **BOTH)
    assert progress.solved == [3]
    assert (out / "model.safetensors").read_bytes() == (result.out / "model.safetensors").read_bytes()

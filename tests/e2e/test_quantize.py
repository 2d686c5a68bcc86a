"""From a model to a checkpoint and back, through the same doors a user takes."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import sarqc
from sarqc.model.calibration_data import windows
from tests.support import tiny

CALIBRATION = dict(num_samples=8, seqlen=64)


@pytest.fixture(scope="module", params=list(tiny.CONFIGS))
def source(request, tmp_path_factory):
    return tiny.save(request.param, tmp_path_factory.mktemp("models") / request.param)


def logits(model):
    text = windows("builtin", tiny.tokenizer, 48, part="evaluation").last(2)
    with torch.inference_mode():
        return model(text.tokens, use_cache=False).logits.float()


def both_logits(out):
    """Of a checkpoint as transformers loads it, and as we do."""
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    theirs.set_experts_implementation("eager")  # whose sums ours reproduces bit for bit; no matter for dense models
    ours, _ = sarqc.load(out, dtype="bfloat16", packed=False)
    return logits(theirs), logits(ours)


@pytest.mark.parametrize(("bits", "group_size"), [(4, "auto"), (3, 32), (2, 16), (8, -1)])
def test_transformers_reads_what_we_write_as_we_do(source, tmp_path, bits, group_size):
    """The oracle is transformers with compressed-tensors, which we did not write.

    Symmetric: compressed-tensors 0.20 builds the zero points of asymmetric weights in a shape transformers then
    refuses; those are held to its packer and decompressor in tests/checkpoint.
    """
    result = sarqc.quantize(source, tmp_path / "out", bits=bits, group_size=group_size, **CALIBRATION)
    theirs, expected = both_logits(result.out)
    original, _ = sarqc.load(source, dtype="bfloat16")
    assert torch.equal(theirs, expected)
    assert not torch.equal(logits(original), expected)


def test_packed_and_expanded_models_agree(source, tmp_path):
    result = sarqc.quantize(source, tmp_path / "out", **CALIBRATION)
    expanded, _ = sarqc.load(result.out, packed=False)
    packed, _ = sarqc.load(result.out, dtype="float32")
    # Expanding rounds each weight to the checkpoint's bf16, 8 bits of mantissa; packed weights are exact in fp32.
    expected = logits(expanded)
    apart = (logits(packed) - expected).abs().amax(-1) >= 2**-8 * 4 * expected.abs().max()
    # A router that is nearly undecided about a token may decide the other way; dense models have no such tokens.
    assert int(apart.sum()) <= (2 if hasattr(expanded.config, "num_experts_per_tok") else 0)


def test_same_input_same_bytes(source, tmp_path):
    first, second = (sarqc.quantize(source, tmp_path / name, **CALIBRATION).out for name in ("a", "b"))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        if name not in {"report.json", "report.html"}:  # they hold times
            assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_every_method_runs_and_reports(source, tmp_path):
    for method in sarqc.METHODS:
        report = sarqc.quantize(source, tmp_path / method, method=method, **CALIBRATION).report
        if sarqc.METHODS[method].channel_scales:
            assert torch.equal(*both_logits(tmp_path / method)), method
        assert json.loads((tmp_path / method / "report.json").read_text()) == report
        assert report["method"]["method"] == method
        assert 0 < report["error"] < 1
        if sarqc.METHODS[method].calibrated:
            assert report["error"] < report["rtn_error"]
        scaled = [site for site in report["sites"] if site["exponent"] > 0]
        assert bool(scaled) == sarqc.METHODS[method].channel_scales


def test_what_is_not_quantized_is_copied_bit_for_bit(source, tmp_path):
    from sarqc.checkpoint.reader import open_checkpoint

    out = sarqc.quantize(source, tmp_path / "out", method="rtn", ignore=[r"o_proj$"]).out
    before, after = open_checkpoint(source), open_checkpoint(out)
    assert before.names() == after.names()
    kept = [name for name in before.names() if after.quantized(name.removesuffix(".weight")) is None]
    assert any("o_proj" in name for name in kept) and any("norm" in name for name in kept)
    for name in kept:
        assert torch.equal(before.load(name), after.load(name)), name
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" in ignored and "model.layers.0.self_attn.o_proj" in ignored


@pytest.mark.parametrize("method", ["awq", "sarqc-awq-gptq"])
def test_channel_scales_reach_the_checkpoint(source, tmp_path, method):
    """Only what may take scales differs from the source: norms, and routers, by powers of two."""
    from sarqc.checkpoint.reader import open_checkpoint

    out = sarqc.quantize(source, tmp_path / "out", method=method, **CALIBRATION).out
    before, after = open_checkpoint(source), open_checkpoint(out)
    assert before.names() == after.names()
    kept = [name for name in before.names() if after.quantized(name.removesuffix(".weight")) is None]
    changed = [name for name in kept if not torch.equal(before.load(name), after.load(name))]
    assert method != "awq" or any("norm" in name for name in changed)  # sarqc has less to win on random weights
    for name in changed:
        assert ".layers." in name and ("norm" in name or name.endswith("gate.weight"))
        if "gate" in name:
            power = (after.load(name).double() / before.load(name).double()).log2()
            assert torch.equal(power, power.round())


def test_weights_far_from_the_source_because_they_were_scaled_are_no_fault(tmp_path, monkeypatch):
    """A few weak inputs, and so large scales on all others: those must not pass for another weight."""
    from safetensors.torch import load_file, save_file

    from sarqc.checkpoint.reader import open_checkpoint

    source = tiny.save("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if "input_layernorm" in name:
            tensor[::16] *= 0.01
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("sarqc.method.awq.EXPONENTS", (0.9,))
    result = sarqc.quantize(source, tmp_path / "out", method="awq", **CALIBRATION)
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = open_checkpoint(source).load(name).float(), open_checkpoint(result.out).load(name).float()
    assert (after - before).norm() > 1.2 * before.norm()
    assert name in result.report["rescaled"] and name not in result.report["weight_errors"]
    assert torch.equal(*both_logits(result.out))

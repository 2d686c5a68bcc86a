"""The whole loop with channel scales: what comes out, under which names, and how the order of the work matters not."""

from __future__ import annotations

import pytest
import torch

from sarqc.config import MethodConfig, QuantConfig
from sarqc.method.awq import EXPONENTS
from sarqc.model.layers import targets
from sarqc.pipeline.streams import Streams
from tests.support.blocks import run_blocks
from tests.support.by_block import embed

QUANT = QuantConfig(bits=3, group_size=32)
SARQC, AWQ = MethodConfig("sarqc-awq-gptq"), MethodConfig("awq")


def run(case, method=SARQC, quant=QUANT, **options):
    return list(run_blocks(case.lazy(), case.source, case.tokens, quant, method, **options))


def leaves(names):
    return {name.removesuffix(".weight").rpartition(".")[2] for name in names}


@pytest.mark.parametrize("method", [SARQC, AWQ], ids=["sarqc", "awq"])
def test_every_target_comes_out_once_and_norms_with_them(tiny, arch, method):
    case = tiny(arch, torch.bfloat16)
    results = run(case, method)
    lazy = case.lazy()
    assert [name for result in results for name in result.weights] == list(targets(lazy, QUANT).linears)
    for result in results:
        norms = [name for name in result.changed if "norm" in name]
        assert norms and all(f".layers.{result.index}." in name for name in result.changed)
        assert not result.changed.keys() & {f"{name}.weight" for name in result.weights}
        for name, tensor in result.changed.items():
            kept = torch.float32 if lazy.stays_in_fp32(name) else torch.bfloat16  # transformers 5.24: some routers
            assert tensor.dtype == kept and tensor.shape == case.source.shape(name) and tensor.isfinite().all()
        for report in result.reports:
            assert 0 <= report.exponent <= EXPONENTS[-1]
            assert (report.unscaled is None) == (arch != "deepseek_v3" or "o_proj" not in report.site)
    assert any(report.exponent > 0 for result in results for report in result.reports)


def test_methods_without_scales_change_nothing(tiny):
    results = run(tiny("llama"), MethodConfig("sarqc-gptq"))
    assert all(result.changed == {} for result in results)
    assert all(report.exponent == 0 and report.unscaled is None for result in results for report in result.reports)


def outliers(case):
    """The checkpoint with a few channels of the block's norms ten times as large, as language models have them."""
    tensors = case.tensors()
    for name, tensor in tensors.items():
        if "layernorm" in name and ".layers." in name:
            tensor[::9] *= 10
    case.source.load = lambda name: tensors[name].clone()
    return case


def test_the_next_block_sees_the_quantized_and_scaled_one(tiny, monkeypatch):
    """Nearly lossless at 8 bits, and far from it where norms are scaled and weights are not, or the other way round."""
    case = outliers(tiny("qwen2_moe"))
    left = []
    leave = Streams.leave_quantized

    def keep(streams, index):
        lost = leave(streams, index)
        if index == 0:
            left.append(torch.cat([arrival.x.clone() for arrival in streams.quantized.leave(0)]))
        return lost

    monkeypatch.setattr(Streams, "leave_quantized", keep)
    quant = QuantConfig(bits=8, group_size=32)
    results = run(case, AWQ, quant)
    run(case, MethodConfig("gptq"), QuantConfig(bits=8, group_size=32, ignore=(r"layers\.0\.(?!.*o_proj)",)))
    actual, expected = left
    lazy = case.lazy()
    lazy.load_outer(case.source, "cpu", torch.float32)
    entering = embed(lazy, case.tokens)
    assert results[0].changed
    assert (actual - expected).norm() < 0.03 * (expected - entering).norm()


def test_a_small_gram_budget_means_more_passes_and_sound_scales(tiny):
    """Scales that experts share are then decided by the first of them; what experts have to themselves is the same."""
    case = tiny("deepseek_v3")
    passes: list[str] = []
    whole, parts = run(case), run(case, gram_budget=5 * 4 * 64 * 64, on_progress=lambda _, stage: passes.append(stage))
    assert sum(stage.startswith("forward") for stage in passes) > 2 * len(parts)
    for one, other in zip(whole, parts):
        assert one.weights.keys() == other.weights.keys() and one.changed.keys() == other.changed.keys()
    down = "model.layers.1.mlp.experts.3.down_proj"
    one, other = whole[0].weights["model.layers.0.mlp.down_proj"], parts[0].weights["model.layers.0.mlp.down_proj"]
    assert (one.codes != other.codes).float().mean() < 0.01
    errors = [[report.error for report in result[1].reports] for result in (whole, parts)]
    assert max(errors[1]) < 1.5 * max(errors[0]) and down in parts[1].weights


def test_an_expert_without_tokens_is_sound(tiny):
    case = tiny("deepseek_v3")
    tensors = case.tensors()
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][2] = -100
    case.source.load = lambda name: tensors[name].clone()
    results = run(case)
    rows = [report.rows for report in results[1].reports if len(report.rows) == 8]
    assert len(rows) == 2 and all(result[2] == 0 and sum(result) > 0 for result in rows)
    for name, weight in results[1].weights.items():
        scaled = weight.dequantize()
        assert scaled.isfinite().all() and scaled.norm() > 0, name


def test_same_input_same_bytes(tiny):
    case = tiny("qwen3_moe", torch.bfloat16)
    first, second = run(case), run(case)
    for one, other in zip(first, second):
        assert one.changed.keys() == other.changed.keys()
        assert all(torch.equal(tensor, other.changed[name]) for name, tensor in one.changed.items())
        for name, weight in one.weights.items():
            assert torch.equal(weight.codes, other.weights[name].codes)
            assert torch.equal(weight.scales, other.weights[name].scales)


def test_scales_are_a_stage_of_their_own(tiny):
    lines = []
    run(tiny("llama"), on_progress=lambda index, stage: lines.append((index, stage)))
    stages = [stage.partition(" ")[0] for index, stage in lines if index == 0]
    # the reference on its way, a look at all sites for their scales, and then site after site
    assert stages == ["load", "reference", "scale", "forward", "scale", *["forward", "solve"] * 4, "forward"]

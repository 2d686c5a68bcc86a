"""The whole loop: every targeted weight comes out once, under the checkpoint's name, whatever the order of the work."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from sarqc.config import MethodConfig, QuantConfig
from sarqc.errors import ArgumentError, ModelError, NumericError
from sarqc.model.build import build
from sarqc.model.layers import targets
from sarqc.pipeline import block, driver, quantize_site
from sarqc.pipeline.activation_store import FileStore
from sarqc.pipeline.forward import Memory
from sarqc.pipeline.offload import Offload
from tests.support.blocks import run_blocks
from tests.support.models import StateDictSource

QUANT = QuantConfig(bits=4, group_size=32)
GPTQ, RTN = MethodConfig("gptq"), MethodConfig("rtn")


def run(case, quant=QUANT, method=GPTQ, source=None, **options):
    source = source or case.source
    tokens = None if not method.calibrated else options.pop("tokens", case.tokens)
    return list(run_blocks(case.lazy(source), source, tokens, quant, method, **options))


def weights_of(results):
    return {name: weight for result in results for name, weight in result.weights.items()}


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name].codes, b[name].codes) and torch.equal(a[name].scales, b[name].scales) for name in a
    )


@pytest.mark.parametrize("method", [GPTQ, RTN], ids=["gptq", "rtn"])
def test_every_target_comes_out_once_in_its_shape(tiny, arch, method):
    case = tiny(arch, torch.bfloat16)
    results = run(case, method=method, micro_batch=2)
    selected = targets(case.lazy(), QUANT)
    assert [result.index for result in results] == list(range(len(results)))
    names = [name for result in results for name in result.weights]
    assert names == list(selected.linears)
    for name, weight in weights_of(results).items():
        shape = case.source.shape(f"{name}.weight")
        assert tuple(weight.codes.shape) == (1, *shape) and weight.scales.dtype == torch.bfloat16
        assert weight.codes.max() < 16 and weight.group_size == 32
        original = case.source.load(f"{name}.weight").float()
        assert (weight.dequantize()[0] - original).norm() < 0.35 * original.norm()
    if method.calibrated:
        rows = [sum(report.rows) for result in results for report in result.reports]
        top_k = getattr(case.model.config, "num_experts_per_tok", 1)
        assert set(rows) <= {case.tokens.numel(), case.tokens.numel() * top_k}


def test_plain_rounding_runs_nothing_forward(tiny, monkeypatch):
    case = tiny("llama")
    monkeypatch.setattr(driver, "Streams", None)
    run(case, method=RTN)
    assert all(".layers." in name for name in case.source.reads)


def test_later_blocks_are_calibrated_on_the_quantized_ones(tiny, monkeypatch):
    """The Gram of the last block's first site is that of the model in which all earlier blocks are quantized."""
    case = tiny("qwen3_moe")
    grams = {}
    solve_site = quantize_site.solve_site

    def spy(name, weight, statistics, *rest, **options):
        grams[name] = statistics.total().second_moment()
        return solve_site(name, weight, statistics, *rest, **options)

    monkeypatch.setattr(quantize_site, "solve_site", spy)
    weights = weights_of(run(case, micro_batch=2))
    dense = {name: t for name, t in case.tensors().items() if name.removesuffix(".weight") not in weights}
    source = StateDictSource(dense, weights, torch.float32)
    model = build(case.lazy(source), source)
    seen = []
    projection = model.model.layers[1].self_attn.q_proj
    projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 64)))
    with torch.no_grad():
        model(case.tokens)
    expected = seen[0].T @ seen[0] / len(seen[0])
    torch.testing.assert_close(
        grams["model.layers.1.self_attn.q_proj"][0].tril(), expected.tril(), rtol=1e-4, atol=1e-6
    )


def test_a_small_gram_budget_only_means_more_passes(tiny):
    case = tiny("deepseek_v3")
    whole = run(case)
    for budget in (1, 5 * 4 * 64 * 64):
        parts = run(case, gram_budget=budget)
        assert same(weights_of(whole), weights_of(parts))
        for one, other in zip(whole, parts):
            lines = [
                [(report.site, report.rows, report.reg_lambda) for report in block.reports] for block in (one, other)
            ]
            assert lines[0] == lines[1]  # however many passes a site took, it is told of as one


def test_micro_batches_do_not_matter_beyond_rounding_of_sums(tiny):
    case = tiny("llama")
    together, apart = weights_of(run(case, micro_batch=5)), weights_of(run(case, micro_batch=1))
    differing = sum(int((together[name].codes != apart[name].codes).sum()) for name in together)
    assert differing <= 0.01 * sum(weight.codes.numel() for weight in together.values())
    assert same(together, weights_of(run(case, micro_batch=5)))


def test_folds_are_stretches_of_windows_kept_apart(tiny, monkeypatch):
    case = tiny("llama")
    seen = []
    choose_lambda = quantize_site.choose_lambda

    def spy(name, kind, weight, statistics, *rest, **options):
        seen.append([int(gram.rows.sum()) for gram in statistics.folds])
        return choose_lambda(name, kind, weight, statistics, *rest, **options)

    monkeypatch.setattr(quantize_site, "choose_lambda", spy)
    run(case, folds=2, micro_batch=2)
    assert seen and all(rows == [2 * 20, 3 * 20] for rows in seen)


def test_partly_ignored_sites_solve_the_rest_alike(tiny):
    case = tiny("mixtral")
    some = QuantConfig(bits=4, group_size=32, ignore=("k_proj", r"layers\.1\..*experts\.1\.w3", r"experts\.0\.w2"))
    whole, part = weights_of(run(case, method=RTN)), weights_of(run(case, quant=some, method=RTN))
    missing = whole.keys() - part.keys()
    assert len(missing) == 2 + 1 + 2 and part.keys() < whole.keys()
    assert same({name: whole[name] for name in part}, part)


def test_an_ignored_layer_stays_as_it_is(tiny):
    """Quantize one layer of block 0 only; block 1 then sees exactly that change."""
    case = tiny("llama")
    lazy = case.lazy()
    quant = QuantConfig(
        bits=2, group_size=32, ignore=(r"layers\.0\.(?!mlp\.down_proj)", r"layers\.1\.(?!mlp\.down_proj)")
    )
    iterator = run_blocks(lazy, case.source, case.tokens, quant, GPTQ)
    first = next(iterator)
    assert list(first.weights) == ["model.layers.0.mlp.down_proj"]
    assert all(parameter.is_meta for parameter in lazy.blocks[0].parameters())
    assert list(next(iterator).weights) == ["model.layers.1.mlp.down_proj"]


def test_a_weight_that_is_not_finite_is_named(tiny):
    case = tiny("mixtral")
    name = "model.layers.1.block_sparse_moe.experts.2.w3"
    tensors = case.tensors()
    tensors[f"{name}.weight"][3, 5] = float("nan")
    for method in (GPTQ, RTN):
        with pytest.raises(NumericError, match=name):
            run(case, source=StateDictSource(tensors), method=method)


def test_activations_that_are_not_finite_are_named(tiny):
    case = tiny("llama")
    tensors = case.tensors()
    tensors["model.layers.1.input_layernorm.weight"][0] = float("inf")
    with pytest.raises(NumericError, match=r"inputs of model\.layers\.1\.self_attn\.q_proj"):
        run(case, source=StateDictSource(tensors))
    tensors = case.tensors()
    tensors["model.embed_tokens.weight"][case.tokens[0, 0]] = float("nan")
    with pytest.raises(NumericError, match="embeddings"):
        run(case, source=StateDictSource(tensors))


def test_a_target_that_is_lost_is_an_error(tiny, monkeypatch):
    find_sites = block.find_sites
    monkeypatch.setattr(block, "find_sites", lambda *args: find_sites(*args)[:-1])
    with pytest.raises(ModelError, match="came out unquantized"):
        run(tiny("llama"))


def test_tokens_that_cannot_be_used_are_refused(tiny):
    case = tiny("llama")
    for options in ({"tokens": None}, {"tokens": case.tokens[0]}, {"folds": 6}):
        with pytest.raises(ArgumentError, match="tokens = "):
            run(case, **options)
    with pytest.raises(ArgumentError, match="does not divide"):
        run(case, quant=QuantConfig(group_size=64))


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float16)])
def test_scales_take_the_checkpoints_dtype(tiny, dtype, expected):
    case = tiny("llama")
    source = StateDictSource({name: tensor.to(dtype) for name, tensor in case.tensors().items()})
    weight = next(iter(run(case, source=source, method=RTN)[0].weights.values()))
    assert weight.scales.dtype == expected


def test_progress_and_seconds_name_the_stages(tiny):
    lines = []
    results = run(tiny("llama"), on_progress=lambda index, stage: lines.append((index, stage)))
    sites = ("q_proj", "o_proj", "gate_proj", "down_proj")
    stages = ["load", *(f"{stage} {site}" for site in sites for stage in ("forward", "solve")), "forward"]
    assert lines == [(index, stage) for index in range(2) for stage in stages]
    assert list(results[0].seconds) == ["load", "forward", "solve"] and all(
        seconds >= 0 for seconds in results[0].seconds.values()
    )


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("how", ["offloaded", "some offloaded", "recomputed", "recomputed and offloaded"])
def test_however_micro_batches_are_held_the_codes_are_the_same(tiny, tmp_path, monkeypatch, kind, how):
    """Error correction included: where a block is recomputed, what is corrected is the same to the bit."""
    monkeypatch.setattr(Offload.__init__, "__defaults__", (1,))
    case, method = tiny(kind), MethodConfig()
    whole = run(case, method=method, micro_batch=2)
    assert any(report.correction_share > 0 for result in whole for report in result.reports)
    store = FileStore(tmp_path) if "offloaded" in how else None
    memory = Memory(100_000 if "some" in how else 0, store, recompute="recomputed" in how)
    assert same(weights_of(whole), weights_of(run(case, method=method, micro_batch=2, memory=memory)))
    assert store is None or store._end > 0


DEEP = textwrap.dedent(
    """
    import torch, transformers
    from sarqc.method.layer import LayerReport
    from sarqc.method.rtn import quantize_rtn
    from sarqc.pipeline import driver, quantize_site
    from sarqc.model.lazy_model import LazyModel
    from sarqc.config import MethodConfig, QuantConfig

    class Endless:
        "Weights made up when they are read: what stays in memory is what the loop keeps."
        def __init__(self, shapes): self.shapes = shapes
        def names(self): return list(self.shapes)
        def shape(self, name): return self.shapes[name]
        def dtype(self, name): return torch.float32
        def load(self, name): return torch.full(self.shapes[name], 0.01)
        def quantized(self, linear): return None

    def quickly(name, weight, statistics, quant, method, *, scale_dtype, scaling, choice):
        report = LayerReport(
            site=name, rows=tuple(statistics.total().rows.tolist()), error=0.0, rtn_error=0.0,
            reg_lambda=0.0, damping=0.0, fallback=None, seconds=0.0,
        )
        return quantize_rtn(weight, quant, "minmax", scale_dtype), report

    quantize_site.solve_site = quickly
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=512, intermediate_size=1024, head_dim=64,
        num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    shapes.pop("lm_head.weight")
    source = Endless(shapes)
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    lazy = LazyModel.from_config(config, source)
    for result in driver.run(lazy, source, tokens, QuantConfig(group_size=128), MethodConfig("gptq")):
        if result.index in (3, 23):
            print(int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) // 1024)
    """
)


def test_peak_memory_does_not_grow_with_the_number_of_blocks():
    # Without the threshold glibc keeps freed tensors of a few MiB in its heap, and that is what would be measured.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "524288"}
    command = [sys.executable, "-c", DEEP]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    after_4, after_24 = map(int, out.stdout.split()[-2:])
    weights = (4 * 512 * 512 + 3 * 512 * 1024) * 4 / 2**20  # MiB of one block; twenty more make 200
    assert after_24 - after_4 < 2 * weights, (after_4, after_24, weights)

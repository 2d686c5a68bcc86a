"""A head that is included: a unit behind the last block, calibrated where micro-batches wait, resumed as a block is."""

from __future__ import annotations

import random
import shutil

import pytest
import torch

import sarqc
from sarqc.config import MethodConfig, QuantConfig
from sarqc.errors import Interrupted
from sarqc.model.build import build
from sarqc.pipeline.activation_store import FileStore
from sarqc.pipeline.forward import Memory
from sarqc.pipeline.offload import Offload
from sarqc.pipeline.resume import default_work
from tests.pipeline.driver_case import same
from tests.support import families, kept
from tests.support.blocks import run_blocks
from tests.support.killing import contents, count_operations, in_child
from tests.support.models import StateDictSource
from tests.support.ranks import in_ranks
from tests.support.stopping import Stopping
from tests.support.tiny import save

QUANT = QuantConfig(bits=3, group_size=32, include=("lm_head",))
CARRY = MethodConfig("sarqc-gptq", error_correction=True)
FP32 = {"seqlen": None, "dtype": "float32"}
SMALL = {"num_samples": 4, "seqlen": 32, "group_size": 32, "micro_batch": 1, "include": ["lm_head"]}


def run(case, quant=QUANT, method=CARRY, lazy=None, **options):
    return list(run_blocks(lazy or case.lazy(), case.source, case.tokens, quant, method, micro_batch=2, **options))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
def test_it_is_calibrated_on_the_final_hidden_states_of_the_quantized_model(tiny, handed_over, kind):
    case = tiny(kind)
    results = run(case)
    assert [list(result.weights) for result in results[2:]] == [["lm_head"]]
    assert all(same(*pair) for pair in zip(results[:2], run(case, QuantConfig(bits=3, group_size=32)), strict=True))
    weights = {name: weight for result in results[:2] for name, weight in result.weights.items()}
    dense = {name: t for name, t in case.tensors().items() if name.removesuffix(".weight") not in weights}
    model = build(case.lazy(), StateDictSource(dense, weights, torch.float32))
    with torch.no_grad():
        hidden = model.base_model(case.tokens).last_hidden_state.flatten(0, 1)
    moment = handed_over["lm_head"].total().second_moment()[0]
    # error correction is added to the stream after the fact, which rounds otherwise than a forward with the result
    torch.testing.assert_close(moment.tril(), (hidden.T @ hidden / len(hidden)).tril(), rtol=1e-3, atol=1e-4)
    assert handed_over["lm_head"].folds[0].cross_gram is None


def test_logits_are_never_made(tiny):
    case, seen = tiny("qwen2"), []
    lazy = case.lazy()
    lazy.model.lm_head.register_forward_hook(lambda _, args, out: seen.append((out.is_meta, out.shape[:-1].numel())))
    run(case, lazy=lazy)
    assert {rows for meta, rows in seen if not meta} == {8}  # the probe, on which sites are found
    run(case, QuantConfig(bits=3, group_size=32), lazy=lazy)
    assert lazy.included == ()


@pytest.mark.parametrize("how", ["offloaded", "recomputed"])
def test_however_micro_batches_are_held_the_codes_are_the_same(tiny, tmp_path, monkeypatch, how):
    monkeypatch.setattr(Offload.__init__, "__defaults__", (1,))
    case = tiny("qwen2")
    memory = Memory(0, FileStore(tmp_path) if how == "offloaded" else None, recompute=how == "recomputed")
    assert all(same(*pair) for pair in zip(run(case), run(case, memory=memory), strict=True))


@pytest.mark.parametrize("method", ["rtn", "awq", "sarqc-awq-gptq"])
def test_methods_without_text_and_with_channel_scales_take_it_too(tiny, method):
    """Nothing in front of a head is scaled for it."""
    case, quant = tiny("qwen2"), QuantConfig(bits=4, group_size=32, include=("lm_head",))
    head = run(case, quant, MethodConfig(method))[-1]
    assert list(head.weights) == ["lm_head"] and head.reports[0].exponent == 0 and not head.changed
    dense = case.tensors()["lm_head.weight"].float()
    assert (head.weights["lm_head"].dequantize(torch.float32)[0] - dense).norm() < 0.5 * dense.norm()


def test_memory_that_runs_out_at_the_head_costs_only_time(tiny):
    case, failed = tiny("qwen2"), []
    plain = run(case)

    def at_the_grams(index, name):
        if (index, name.partition(" ")[0]) == (2, "forward") and not failed:
            failed.append(index)
            raise torch.OutOfMemoryError("tried to allocate 2 GB")

    again = run(case, on_progress=at_the_grams)
    assert failed == [2] and "memory left at lm_head" in again[2].notes[0]
    differing = int((plain[2].weights["lm_head"].codes != again[2].weights["lm_head"].codes).sum())
    assert differing <= 0.01 * plain[2].weights["lm_head"].codes.numel()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def straight(source, tmp_path_factory):
    return kept.quantize(source, tmp_path_factory.mktemp("straight") / "out", **SMALL)


def weights(out):
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("lost", [False, True], ids=["hidden states", "hidden states lost"])
def test_a_run_stopped_before_the_head_makes_the_same_bytes(source, straight, tmp_path, lost):
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match="stopped after block 2 of 3"):
        sarqc.quantize(source, out, progress=Stopping(2), **SMALL)
    if lost:
        (default_work(out) / "hidden.safetensors").unlink()
    progress = Stopping()
    sarqc.quantize(source, out, progress=progress, **SMALL)
    assert progress.done == 2 and progress.solved == [2] and weights(out) == weights(straight.out)


def test_kills_lose_nothing(source, tmp_path):
    """The second half of a run's file operations: the last block's, the head's, and those that make the output."""
    settings = {"model": source, **SMALL}
    operations = count_operations(lambda: sarqc.quantize(**settings, out=tmp_path / "straight"))
    expected, chosen = contents(tmp_path / "straight"), random.Random("the head")
    for _ in range(4):
        out = tmp_path / "out"
        moment = chosen.randint(operations // 2, operations - 20)
        assert in_child(lambda: sarqc.quantize(**settings, out=out), kill_at=moment) == -9  # noqa: B023
        if not out.exists():
            sarqc.quantize(**settings, out=out)
        assert contents(out) == expected
        shutil.rmtree(out)


def test_ordered_ranks_give_the_bytes_of_one_process(source, straight, tmp_path):
    ended = in_ranks(
        2, lambda _: sarqc.quantize(source, tmp_path / "out", **SMALL | {"ordered": True}), tmp_path / "log"
    )
    assert ended == [(0, "")] * 2 and weights(tmp_path / "out") == weights(straight.out)


def test_a_head_whose_dtype_the_model_asks_for_is_handed_what_a_run_computes_in(tmp_path, registered):
    """mamba2 casts to it, while the head is on meta; the checkpoint has bf16 and the run has fp32."""
    model = families.save("mamba2", tmp_path / "model")
    result = sarqc.quantize(model, tmp_path / "out", **SMALL | {"dataset": families.TOKENS, "num_samples": 2} | FP32)
    assert result.report["sites"][-1]["site"] == "lm_head"
    assert families.apart(families.logits(result.out), families.ours(result.out)) < 0.05


def test_two_layers_behind_the_blocks_follow_each_other(tmp_path):
    """What leaves the first, with its quantized weight, enters the second; a run stopped between them goes on."""
    model = families.save("opt", tmp_path / "model", word_embed_proj_dim=32, tie_word_embeddings=False)
    settings = SMALL | {
        "include": ["lm_head", "project_out"],
        "dataset": families.TOKENS,
        "seqlen": None,
        "num_samples": 2,
    }
    result = sarqc.quantize(model, tmp_path / "straight", **settings)
    assert [site["site"] for site in result.report["sites"][-2:]] == ["model.decoder.project_out", "lm_head"]
    blocks = len(result.report["blocks"])
    with pytest.raises(Interrupted):
        sarqc.quantize(model, tmp_path / "out", progress=Stopping(blocks - 1), **settings)
    sarqc.quantize(model, tmp_path / "out", **settings)
    assert weights(tmp_path / "out") == weights(result.out)

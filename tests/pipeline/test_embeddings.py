"""Embeddings that are quantized too: the quantized stream begins with the codes that are stored at the end."""

from __future__ import annotations

import pytest
import torch

import sarqc
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.config import MethodConfig, QuantConfig
from sarqc.model.build import build
from sarqc.pipeline.points import Point
from sarqc.pipeline.streams import Streams
from tests.pipeline.driver_case import same
from tests.support import families
from tests.support.blocks import run_blocks
from tests.support.models import StateDictSource
from tests.support.ranks import in_ranks
from tests.support.tiny import save

QUANT = QuantConfig(bits=3, group_size=32, include=("embed_tokens",), embedding_bits=4)


def run(case, quant=QUANT, method=None, **options):
    method = method or MethodConfig("sarqc-gptq", error_correction=True)
    return list(run_blocks(case.lazy(), case.source, case.tokens, quant, method, micro_batch=2, **options))


def test_blocks_are_calibrated_behind_the_rounded_embedding(tiny, handed_over):
    case = tiny("qwen2")
    results = run(case)
    moment = handed_over["model.layers.0.self_attn.q_proj"].total().second_moment()[0].tril()
    weights = {name: weight for result in results for name, weight in result.weights.items()}
    assert list(results[-1].weights) == ["model.embed_tokens"] and weights["model.embed_tokens"].bits == 4
    dense = {name: t for name, t in case.tensors().items() if name.removesuffix(".weight") not in weights}
    model = build(case.lazy(), StateDictSource(dense, weights, torch.float32))
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.base_model(case.tokens)
    x = seen[0].flatten(0, 1)
    torch.testing.assert_close(moment, (x.T @ x / len(x)).tril(), rtol=1e-4, atol=1e-5)


def test_the_reference_enters_with_the_original(tiny, monkeypatch):
    case, entered, begin = tiny("qwen2"), [], Streams.begin

    def beginning(streams, *args, **options):
        begun = begin(streams, *args, **options)
        for forward in (streams.reference, streams.quantized):
            entered.append(torch.cat([arrival.x.clone() for arrival in forward.at(Point("enter", 0))]))
        return begun

    monkeypatch.setattr(Streams, "begin", beginning)
    embedding = run(case)[-1].weights["model.embed_tokens"].dequantize()[0]
    original = case.tensors()["model.embed_tokens.weight"].float()
    assert torch.equal(entered[0], original[case.tokens]) and torch.equal(entered[1], embedding[case.tokens])


@pytest.mark.parametrize("method", ["gptq", "awq", "sarqc-awq-gptq"])
def test_every_method_rounds_it_alike(tiny, method):
    """Nothing but the grid differs: searched scales, or min-max where the method has these."""
    case = tiny("qwen2")
    chosen = MethodConfig(method)
    codes = run(case, method=chosen)[-1].weights["model.embed_tokens"]
    others = run(case, method=MethodConfig("rtn", scales=chosen.scales))[-1].weights["model.embed_tokens"]
    assert torch.equal(codes.codes, others.codes) and torch.equal(codes.scales, others.scales)


class NoMemory:
    """Fails once, where a block's Grams are summed."""

    def __init__(self, block: int) -> None:
        self.block, self.failed = block, False

    def __call__(self, index: int, name: str) -> None:
        if (index, name.partition(" ")[0]) == (self.block, "forward") and not self.failed:
            self.failed = True
            raise torch.OutOfMemoryError("tried to allocate 2 GB")


def test_memory_that_runs_out_enters_again_with_the_same(tiny):
    case, failing = tiny("qwen2"), NoMemory(0)
    plain, again = run(case), run(case, on_progress=failing)
    assert failing.failed and same(plain[-1], again[-1])
    for linear, weight in plain[0].weights.items():
        assert int((weight.codes != again[0].weights[linear].codes).sum()) <= 0.01 * weight.codes.numel()


def test_memory_that_runs_out_later_finds_what_other_blocks_look_up(tmp_path):
    """gemma4 adds a row of a second embedding in each block: the quantized stream has it rounded there too."""
    source, failing = families.save("gemma4_text", tmp_path / "model"), NoMemory(1)
    quant = QuantConfig(bits=3, group_size=32, include=("embed_tokens_per_layer",))
    with open_checkpoint(source) as checkpoint:
        blocks = run_blocks(
            families.lazy(source), checkpoint, families.TOKENS, quant, MethodConfig("gptq"),
            micro_batch=2, on_progress=failing,
        )  # fmt: skip
        results = list(blocks)
    assert failing.failed and any("halved" in note for note in results[1].notes)


def test_ordered_ranks_give_the_bytes_of_one_process(tmp_path):
    source = save("llama", tmp_path / "model", tie_word_embeddings=True)
    small = {"num_samples": 4, "seqlen": 32, "group_size": 32, "micro_batch": 1, "include": ["embed_tokens", "lm_head"]}
    sarqc.quantize(source, tmp_path / "straight", **small)
    ended = in_ranks(
        2, lambda _: sarqc.quantize(source, tmp_path / "out", **small | {"ordered": True}), tmp_path / "log"
    )
    assert ended == [(0, "")] * 2
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "out")]
    assert written[0] == written[1]

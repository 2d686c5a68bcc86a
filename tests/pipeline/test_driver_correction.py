"""Residual error correction in the driver: which layers correct, towards what, resumed, and short of memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sarqc.checkpoint.state import ChunkedTensor
from sarqc.config import MethodConfig, QuantConfig
from sarqc.method.lambda_search import LambdaSearch
from sarqc.pipeline import channel_scales, driver
from sarqc.pipeline.points import Point
from sarqc.pipeline.streams import Streams
from tests.pipeline.driver_case import CARRY, QUANT, block, entered, run, same
from tests.support.blocks import run_blocks
from tests.support.by_block import embed


def asked_of(x, lacking):
    """R^T X, where both R and X count less in rows of X [B, L, K] that are longer than two medians of their window."""
    length = x.double().norm(dim=-1, keepdim=True)
    held = (2 * length.median(1, keepdim=True).values / length).clamp(max=1)
    return torch.einsum("bln,blk->nk", held * lacking.double(), held * x.double())


def test_the_last_layer_is_asked_for_what_the_stream_lacks(tiny, handed_over):
    """R^T X with R = what leaves the original block less what leaves the block in which all others are quantized."""
    case = tiny("llama")
    results = list(run(case, MethodConfig(reg_lambda=0.3, error_correction=True), micro_batch=2))
    asked = [name for name, statistics in handed_over.items() if statistics.folds[0].cross_gram is not None]
    names = ("self_attn.o_proj", "mlp.down_proj")
    assert asked == [f"model.layers.{index}.{name}" for index in range(len(results)) for name in names]
    lazy = entered(case)
    entering = embed(lazy, case.tokens)
    original = block(case, lazy, 0, {})(entering)
    others = {name: weight for name, weight in results[0].weights.items() if "down_proj" not in name}
    inputs = []
    hook = lazy.model.get_submodule(asked[1]).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    lacking = original - block(case, lazy, 0, others)(entering)
    hook.remove()
    lacking[:, 0] = 0
    expected = asked_of(inputs[0], lacking)
    actual = handed_over[asked[1]].total().cross_gram[0].double()
    assert (actual - expected).norm() < 1e-3 * expected.norm()


def test_a_layer_inside_the_block_is_asked_for_what_its_stream_lacks(tiny, handed_over):
    """Where all experts are routed: R is taken behind o_proj, with q, k and v quantized."""
    case = tiny("qwen3_moe")
    result = next(run(case, MethodConfig(reg_lambda=0.3, error_correction=True), micro_batch=2))
    lazy = entered(case)
    entering = embed(lazy, case.tokens)
    before = {name: weight for name, weight in result.weights.items() if name[-6:] in ("q_proj", "k_proj", "v_proj")}
    read = {}
    for weights in ({}, before):
        call = block(case, lazy, 0, weights)
        names = ("self_attn.o_proj", "post_attention_layernorm")
        hooks = [
            lazy.model.get_submodule(f"model.layers.0.{name}").register_forward_pre_hook(
                lambda _, args, at=(name, bool(weights)): read.setdefault(at, args[0])
            )
            for name in names
        ]
        call(entering)
        for hook in hooks:
            hook.remove()
    lacking = read["post_attention_layernorm", False] - read["post_attention_layernorm", True]
    lacking[:, 0] = 0
    expected = asked_of(read["self_attn.o_proj", True], lacking)
    actual = handed_over["model.layers.0.self_attn.o_proj"].total().cross_gram[0].double()
    assert (actual - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize(("kind", "method"), [("llama", "gptq"), ("qwen3_moe", "gptq"), ("llama", "sarqc-awq-gptq")])
def test_what_leaves_the_blocks_is_nearer_to_the_original(tiny, kind, method):
    """On the text that was calibrated on; that other text gains is for real models to show (benchmarks/quality)."""
    case = tiny(kind)
    lacking = {}
    for carry in (False, True):
        results = list(run(case, MethodConfig(method, error_correction=carry), folds=2, micro_batch=2))
        assert any(report.correction_share > 0 for result in results for report in result.reports) is carry
        lazy = entered(case)
        hidden = original = embed(lazy, case.tokens)
        for result in results:
            original = block(case, lazy, result.index, {})(original)
            hidden = block(case, lazy, result.index, result.weights, result.changed)(hidden)
        lacking[carry] = float((hidden - original)[:, 1:].pow(2).sum())
    assert lacking[True] < lacking[False]


@pytest.mark.parametrize(
    ("kind", "asking"),
    [
        ("llama", ["0.self_attn.o_proj", "0.mlp.down_proj", "1.self_attn.o_proj", "1.mlp.down_proj"]),
        (
            "deepseek_v3",
            ["0.self_attn.o_proj", "0.mlp.down_proj", "1.self_attn.o_proj", "1.mlp.shared_experts.down_proj"],
        ),
        ("qwen3_moe", ["0.self_attn.o_proj", "1.self_attn.o_proj"]),
        ("qwen2_moe", ["0.self_attn.o_proj", "1.self_attn.o_proj"]),
        ("gemma3", []),
    ],
)
def test_only_a_layer_that_writes_into_the_stream_is_asked(tiny, handed_over, kind, asking):
    """o_proj, and down_proj, also of a shared expert; not with a gate behind it, nor routed experts. None where norms
    stand behind all of them: the reference is let go."""
    case = tiny(kind)
    results = list(run(case, MethodConfig(reg_lambda=0.3, error_correction=True), micro_batch=2))
    asked = [name for name, statistics in handed_over.items() if statistics.folds[0].cross_gram is not None]
    assert asked == [f"model.layers.{name}" for name in asking]
    notes = [note for result in results for note in result.notes]
    lines = [note for note in notes if "the error of earlier layers is not corrected" in note]
    assert len(lines) == (0 if asking else 1)
    without = list(run(case, MethodConfig(reg_lambda=0.3, error_correction=False), micro_batch=2, folds=2))
    assert all(same(*pair) for pair in zip(results, without, strict=True)) is not bool(asking)


def test_a_first_block_that_is_left_alone_says_nothing_of_the_others(tiny, handed_over):
    case, quant = tiny("llama"), QuantConfig(bits=3, group_size=32, ignore=(r"layers\.0\.",))
    results = list(run_blocks(case.lazy(), case.source, case.tokens, quant, CARRY))
    assert [name for name, seen in handed_over.items() if seen.folds[0].cross_gram is not None] == [
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert not results[0].reports and not any(result.notes for result in results)


def kept(stored_states):
    """The same in memory of its own, as if it had been stored."""
    if stored_states is None:
        return None
    return replace(
        stored_states, hidden=ChunkedTensor.of(torch.stack([row.clone() for row in stored_states.hidden.rows()]))
    )


@pytest.mark.parametrize("handed", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_going_on_carries_the_same_errors(tiny, kind, handed):
    """From a later block, with its states at hand or made again: the reference starts before block 0 either way."""
    case, handovers, whole = tiny(kind), [], []
    for result in run(case, CARRY, micro_batch=2):
        whole.append(result)
        handovers.append(kept(result.stored_states))
    assert all(any(report.correction_share > 0 for report in result.reports) for result in whole[1:])
    *_, last = whole
    lambda_search = LambdaSearch.restored(report.held_out for result in whole[:-1] for report in result.reports)
    start = driver.Start(
        last.index,
        handovers[last.index - 1] if handed else None,
        lambda index: (whole[index].weights, whole[index].changed),
        lambda_search,
    )
    (again,) = run(case, CARRY, micro_batch=2, start=start)
    assert same(again, last)


def test_states_that_are_not_all_that_a_block_needs_are_made_again(tiny):
    """What else it is entered with has another fingerprint: the blocks before are run."""
    case, handovers, whole, asked = tiny("llama"), [], [], []
    for result in run(case, CARRY, micro_batch=2):
        whole.append(result)
        handovers.append(kept(result.stored_states))

    def stored(index):
        asked.append(index)
        return whole[index].weights, whole[index].changed

    lambda_search = LambdaSearch.restored(report.held_out for report in whole[0].reports)
    start = driver.Start(1, replace(handovers[0], fingerprint="of another model"), stored, lambda_search)
    (again,) = run(case, CARRY, micro_batch=2, start=start)
    assert asked == [0] and same(again, whole[1])


def test_the_reference_is_exactly_the_original(tiny, monkeypatch):
    """Behind every block it is what the untouched model has there."""
    case, seen, leave = tiny("llama"), [], Streams.leave_reference

    def spy(self, index):
        leave(self, index)
        seen.append(torch.cat([arrival.x.clone() for arrival in self.reference.at(Point("leave", index))]))

    monkeypatch.setattr(Streams, "leave_reference", spy)
    list(run(case, CARRY, micro_batch=2))
    with torch.no_grad():
        expected = case.model(case.tokens, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(seen[0], expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(case.model.model.norm(seen[1]), expected[2], rtol=1e-5, atol=1e-5)


def test_the_layer_that_makes_up_for_errors_has_no_channel_scales(tiny, handed_over):
    """All others have, and what it is asked is what the stream lacks with them in place."""
    case = tiny("llama")
    result = next(run(case, MethodConfig("sarqc-awq-gptq", reg_lambda=0.3), micro_batch=2))
    *others, last = result.reports
    assert last.site.endswith("down_proj") and last.exponent == 0.0 and last.correction_share > 0
    assert any(report.exponent > 0 for report in others) and any("norm" in name for name in result.changed)
    lazy = entered(case)
    entering = embed(lazy, case.tokens)
    original = block(case, lazy, 0, {})(entering)
    rest = {name: weight for name, weight in result.weights.items() if "down_proj" not in name}
    inputs = []
    hook = lazy.model.get_submodule(last.site).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    lacking = original - block(case, lazy, 0, rest, result.changed)(entering)
    hook.remove()
    lacking[:, 0] = 0
    expected = asked_of(inputs[0], lacking)
    actual = handed_over[last.site].total().cross_gram[0].double()
    assert (actual - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("method", ["sarqc-gptq", "sarqc-awq-gptq"])
@pytest.mark.parametrize("index", [0, 1])
def test_memory_that_runs_out_in_the_last_layer_costs_only_time(tiny, monkeypatch, method, index):
    """The block is loaded anew, and entered again by all streams, with smaller micro-batches."""
    case, method, failed = tiny("llama"), MethodConfig(method), []
    plain = list(run(case, method, micro_batch=2))
    lazy = case.lazy()
    layer = lazy.blocks[index].mlp.down_proj
    forward = layer.forward

    def full(x):
        if len(x) == 2 and stages[-1] == (index, "forward") and not failed:
            failed.append(len(x))
            raise torch.OutOfMemoryError("tried to allocate 2 GB")
        return forward(x)

    stages = []
    monkeypatch.setattr(layer, "forward", full)
    again = list(
        run_blocks(
            lazy, case.source, case.tokens, QUANT, method, micro_batch=2,
            on_progress=lambda index, name: stages.append((index, name.partition(" ")[0])),
        )
    )  # fmt: skip
    assert failed == [2] and "micro-batch of 2 sequences halved" in again[index].notes[0]
    for a, b in zip(plain, again, strict=True):
        differing = sum(int((a.weights[name].codes != b.weights[name].codes).sum()) for name in a.weights)
        assert differing <= 0.01 * sum(weight.codes.numel() for weight in a.weights.values())


def test_memory_that_runs_out_in_the_search_of_scales_leaves_the_windows_as_they_are(tiny, monkeypatch):
    """Windows have no part in it: of Grams there are fewer at a time."""
    case, search, failed = tiny("qwen3_moe"), channel_scales.search, []

    def full(readers, *args, **options):
        if not failed:
            failed.append(len(readers))
            raise torch.OutOfMemoryError("tried to allocate 2 GB")
        return search(readers, *args, **options)

    monkeypatch.setattr(channel_scales, "search", full)
    notes = [note for result in run(case, MethodConfig("sarqc-awq-gptq"), micro_batch=2) for note in result.notes]
    assert failed and len(notes) == 1 and "Grams at a time halved" in notes[0]


def test_a_row_that_leaves_the_block_infinite_is_left_out_though_what_enters_the_layer_is_sound(tiny, monkeypatch):
    """As where fp16 overflows in the last layer's output: one row of five windows, in both streams."""
    case = tiny("llama")
    lazy = case.lazy()
    forward = lazy.blocks[1].mlp.forward

    def overflowing(x):
        leaving = forward(x)
        if x.shape[:2] == (1, case.tokens.shape[1]):  # the one window that is a batch of its own
            leaving[0, 5, 0] = float("inf")
        return leaving

    monkeypatch.setattr(lazy.blocks[1].mlp, "forward", overflowing)
    *_, last = run_blocks(lazy, case.source, case.tokens, QUANT, CARRY, micro_batch=2)
    assert any(f"1 of {case.tokens.numel()} rows" in note and "down_proj" in note for note in last.notes)
    assert last.reports[-1].correction_share > 0
    assert all(bool(torch.isfinite(weight.scales).all()) for weight in last.weights.values())


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("where", ["behind the probe", "in the probe"])
def test_memory_that_runs_out_in_the_last_forward_costs_only_time(tiny, monkeypatch, where, index):
    """On another rank while the probe of this one has left the block, or in the probe itself."""
    case, leave, failed = tiny("llama", num_hidden_layers=3), Streams.leave_probe, []
    plain = list(run(case, CARRY, micro_batch=2))

    def full(self, block):
        if where == "behind the probe":
            leave(self, block)
        if block == index and not failed:
            failed.append(block)
            monkeypatch.setattr(self.lazy.blocks[block].mlp, "forward", no_memory)
        leave(self, block)

    def no_memory(_):
        monkeypatch.undo()
        raise torch.OutOfMemoryError("tried to allocate 2 GB")

    def on_another_rank(self, block):
        leave(self, block)
        if block == index and not failed:
            failed.append(block)
            raise torch.OutOfMemoryError("tried to allocate 2 GB")

    monkeypatch.setattr(Streams, "leave_probe", on_another_rank if where == "behind the probe" else full)
    again = list(run(case, CARRY, micro_batch=2))
    assert failed == [index] and "micro-batch of 2 sequences halved" in again[index].notes[0]
    assert all(same(*pair) for pair in zip(plain[:index], again[:index], strict=True))

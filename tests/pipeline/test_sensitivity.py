"""The first measure_sensitivity: every site once, in the unit it says, and nothing of the model is changed by it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from greenlet import getcurrent

from sarqc.checkpoint.reader import open_checkpoint
from sarqc.config import MethodConfig, QuantConfig
from sarqc.errors import ArgumentError, ResourceError
from sarqc.method.rtn import quantize_rtn
from sarqc.model.layers import targets
from sarqc.model.lazy_model import LazyModel
from sarqc.pipeline import sensitivity, work_split
from sarqc.pipeline.execution import Execution
from sarqc.pipeline.streams import PROBE_TOKENS
from sarqc.pipeline.task import Task
from tests.pipeline import classes

QUANT = QuantConfig(group_size=16, avg_bits=4, bit_options=(2, 4, 8))


def measure_sensitivity(case, tokens=None, lazy=None, **options):
    lazy = lazy or case.lazy()
    mine = options.pop("mine", lambda _: True)
    execution = Execution(**dict(dtype=torch.float32, micro_batch=2, gram_budget=1 << 30) | options)
    selected = targets(lazy, QUANT)
    tokens = case.tokens if tokens is None else tokens
    return list(
        sensitivity.measure_sensitivity(lazy, case.source, selected, tokens, QUANT, MethodConfig(), execution, mine)
    )


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "deepseek_v3"])
def test_every_linear_is_looked_at_once(tiny, kind):
    case = tiny(kind)
    lazy = case.lazy()
    losses = measure_sensitivity(case, lazy=lazy)
    assert sorted(linear for _, site in losses for linear in site.linears) == sorted(targets(lazy, QUANT).linears)
    for _, site in losses:
        assert list(site.losses) == [2, 4, 8] and site.losses[2] > site.losses[4] > site.losses[8] > 0
        assert 0 < site.divergence < 10 and len(site.shapes) == len(site.linears)


def rounded(site, weight, statistics, quant, method, scale_dtype, experts=slice(None)):
    """RTN in the place of the solver, so that a trial can be made by hand."""
    return quantize_rtn(weight, quant.at(4), "minmax", scale_dtype)


def by_hand(model, linear, few):
    """Divergence of the next token with this Linear rounded."""
    with torch.no_grad():
        changed = copy.deepcopy(model)
        weight = changed.get_submodule(linear).weight
        weight.copy_(rounded("", weight[None], None, QUANT, None, torch.bfloat16).dequantize()[0])
        before, after = (one(few).logits[:, :-1].log_softmax(-1) for one in (model, changed))
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_the_divergence_is_that_of_the_whole_model(tiny, monkeypatch):
    """By hand: change one site of the first block of an ordinary model, and compare what both say next."""
    case = tiny("llama")
    monkeypatch.setattr(sensitivity, "probe_weight", rounded)
    known = next(site for _, site in measure_sensitivity(case) if site.site.endswith("0.mlp.down_proj"))
    expected = by_hand(case.model, known.site, case.tokens[::3])  # of five windows, the first and the fourth
    assert known.divergence == pytest.approx(expected, rel=1e-3) and expected > 1e-5


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_blocks_that_share_keys_and_values_are_measured_too(tmp_path, monkeypatch, name):
    """The last two blocks read what the first two have left, so that projections of those count for all four."""
    model = classes.build(name)
    model.save_pretrained(tmp_path)
    source, tokens = open_checkpoint(tmp_path), torch.cat(classes.windows())[:5]
    case = SimpleNamespace(source=source, tokens=tokens, lazy=lambda: LazyModel.from_folder(tmp_path, source))
    monkeypatch.setattr(sensitivity, "probe_weight", rounded)
    values = [site for _, site in measure_sensitivity(case)]
    assert len({linear for site in values for linear in site.linears}) == sum(len(site.linears) for site in values)
    alone = [site for site in values if len(site.linears) == 1]
    assert {int(site.site.split(".")[2]) for site in alone} == {0, 1, 2, 3}
    for site in alone[::3]:
        assert site.divergence == pytest.approx(by_hand(model, site.site, tokens[::3]), rel=1e-2, abs=1e-7)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_from_the_embeddings_it_is_the_same(tiny, monkeypatch, kind):
    """As where blocks read keys and values of earlier ones: no block can be entered with hidden states alone."""
    case = tiny(kind)
    expected, tried = measure_sensitivity(case), []
    monkeypatch.setattr(sensitivity, "fingerprint", lambda entry: tried.append(entry) or str(len(tried)))
    assert measure_sensitivity(case) == expected and len(tried) == 2, "the second block is found to need more"


def test_shared_out_it_is_the_same(tiny):
    case = tiny("qwen3_moe")
    whole = measure_sensitivity(case)
    parts = [
        one for rank in range(2) for one in measure_sensitivity(case, mine=lambda index, rank=rank: index % 2 == rank)
    ]
    assert sorted(parts, key=lambda one: one[0]) == whole


def test_experts_in_portions_lose_as_much(tiny):
    """A budget of one Gram changes which experts are solved, not what the site is told to lose by much."""
    case = tiny("qwen3_moe")
    for (_, one), (_, other) in zip(measure_sensitivity(case), measure_sensitivity(case, gram_budget=1)):
        assert one.divergence == other.divergence
        assert all(0.3 < one.losses[width] / other.losses[width] < 3 for width in one.losses)


def test_experts_are_solved_in_pieces_as_in_a_run_and_lose_the_same(tiny, monkeypatch):
    case, most, probe_weight = tiny("qwen3_moe"), [], sensitivity.probe_weight
    whole = measure_sensitivity(case)

    def watched(site, weight, *rest):
        most.append(len(weight))
        return probe_weight(site, weight, *rest)

    monkeypatch.setattr(sensitivity, "probe_weight", watched)
    monkeypatch.setitem(work_split.SOLVE_BYTES, "cpu", 1)
    assert measure_sensitivity(case) == whole and max(most) == 1


@pytest.mark.parametrize("where", ["probe_weight", "loss_by_bits"])
def test_memory_that_runs_out_while_solving_costs_only_time(tiny, monkeypatch, where):
    """Fewer Grams at a time, in as many tries as it takes."""
    case, held, call = tiny("qwen3_moe"), [], getattr(sensitivity, where)

    def full(site, weight, statistics, *rest):
        held.append(len(statistics.rows()))
        if held[-1] > 2:
            raise torch.OutOfMemoryError("tried to allocate 2 GB")
        return call(site, weight, statistics, *rest)

    whole = measure_sensitivity(case)
    monkeypatch.setattr(sensitivity, where, full)
    again = measure_sensitivity(case)
    assert [site.divergence for _, site in again] == [site.divergence for _, site in whole] and 1 <= held.count(4) < 4


def test_a_device_too_small_for_one_gram_is_said(tiny, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("tried to allocate 2 GB")

    monkeypatch.setattr(sensitivity, "probe_weight", full)
    with pytest.raises(ResourceError, match="one Gram at a time"):
        measure_sensitivity(tiny("qwen3_moe"))


def test_one_window_is_cut_in_two(tiny):
    case = tiny("llama")
    assert len(measure_sensitivity(case, case.tokens[:1])) == len(measure_sensitivity(case))
    with pytest.raises(ArgumentError, match="3 tokens are too few to measure losses on"):
        measure_sensitivity(case, case.tokens[:1, :3])


def test_the_blocks_are_left_as_they_were(tiny):
    case = tiny("mixtral")
    lazy = case.lazy()
    first = measure_sensitivity(case, lazy=lazy)
    assert measure_sensitivity(case, lazy=lazy) == first
    assert all(parameter.is_meta for parameter in lazy.blocks[0].parameters())


def test_memory_that_runs_out_in_a_forward_is_said_as_it_is(tiny, monkeypatch):
    """The forward has ended by then: with fewer Grams at a time it would not go on."""
    case = tiny("qwen3_moe")
    lazy = case.lazy()
    norm = lazy.blocks[1].post_attention_layernorm

    def full(hidden):
        if isinstance(getcurrent(), Task) and hidden.shape[1] > PROBE_TOKENS:
            raise torch.OutOfMemoryError("tried to allocate 2 GB")
        return type(norm).forward(norm, hidden)

    monkeypatch.setattr(norm, "forward", full)
    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate 2 GB"):
        measure_sensitivity(case, lazy=lazy)


def test_a_layer_that_runs_out_does_not_halve_the_grams_of_others(tiny, monkeypatch):
    """A dense layer has one Gram, however many the experts before it had."""
    case, call = tiny("qwen3_moe"), sensitivity.probe_weight

    def full(site, *rest):
        if site == "model.layers.1.self_attn.q_proj":
            raise torch.OutOfMemoryError("tried to allocate 2 GB")
        return call(site, *rest)

    halved = []
    monkeypatch.setattr(sensitivity.Portions, "halve", halved.append)
    monkeypatch.setattr(sensitivity, "probe_weight", full)
    with pytest.raises(ResourceError, match="one Gram at a time"):
        measure_sensitivity(case)
    assert not halved


def test_one_block_is_in_memory_at_a_time_when_measuring_begins_again(tiny, monkeypatch):
    case, tried = tiny("llama"), []
    lazy = case.lazy()
    load = lazy.load_block

    def alone(index, *rest):
        assert all(parameter.is_meta for block in lazy.blocks for parameter in block.parameters())
        load(index, *rest)

    monkeypatch.setattr(lazy, "load_block", alone)
    monkeypatch.setattr(sensitivity, "fingerprint", lambda entry: tried.append(entry) or str(len(tried)))
    assert measure_sensitivity(case, lazy=lazy) and len(tried) == 2

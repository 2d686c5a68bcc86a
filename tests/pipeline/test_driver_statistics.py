"""What the driver collects beyond plain Grams: folds to choose lambda on, and the pool of experts."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch

from sarqc.config import MethodConfig
from sarqc.method.lambda_search import GRID, LambdaSearch
from sarqc.pipeline import quantize_site, work_split
from sarqc.pipeline.grams import Collector
from tests.pipeline.driver_case import AUTO, QUANT, from_the_first, run, same
from tests.support.blocks import run_blocks


def test_a_lambda_to_choose_means_two_folds_and_scores_pooled_over_depth(tiny, handed_over, monkeypatch):
    """Two of them to choose by, and what is solved has seen both as one."""
    lambda_search, folds, choose = LambdaSearch(), [], quantize_site.choose_lambda

    def spy(site, kind, weight, statistics, *rest, **options):
        folds.append((len(statistics.folds), statistics.total().sum))
        return choose(site, kind, weight, statistics, *rest, **options)

    monkeypatch.setattr(quantize_site, "choose_lambda", spy)
    results = list(run(tiny("llama"), start=from_the_first(lambda_search)))
    assert {count for count, _ in folds} == {2}
    for (_, before), after in zip(folds, handed_over.values(), strict=True):
        assert len(after.folds) == 1 and torch.equal(after.total().sum, before)
    kinds = {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}
    assert lambda_search.tracks.keys() == kinds
    assert all(track.seen == len(results) == 2 for track in lambda_search.tracks.values())
    for report in (report for result in results for report in result.reports):
        assert report.reg_lambda in [pytest.approx(s) for s in GRID]
        assert report.held_out["kind"] in kinds and len(report.held_out["curve"]) >= 3


def test_a_given_lambda_needs_one_fold_and_one_window_leaves_the_rule(tiny, handed_over):
    list(run(tiny("llama"), MethodConfig(reg_lambda=0.5, error_correction=False)))
    assert all(len(statistics.folds) == 1 for statistics in handed_over.values())
    case = tiny("llama")
    results = list(run_blocks(case.lazy(), case.source, case.tokens[:1], QUANT, AUTO))
    assert all("prior" in report.held_out["why"] for result in results for report in result.reports)


def test_reports_hold_all_that_was_learnt_about_lambdas(tiny):
    """What a run that is taken up again restores from the reports of a block is what was known when it was done."""
    lambda_search = LambdaSearch()
    first = next(run(tiny("llama"), start=from_the_first(lambda_search)))
    records = json.loads(json.dumps([dict(report.held_out) for report in first.reports]))
    assert LambdaSearch.restored(records) == lambda_search and len(lambda_search.tracks) == 4


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_experts_borrow_the_same_however_the_layer_is_cut(tiny, kind):
    case, method = tiny(kind), MethodConfig(reg_lambda=0.3, expert_shrinkage=0.5)
    whole, cut = list(run(case, method)), list(run(case, method, gram_budget=1))
    for a, b in zip(whole, cut):
        differing = sum(int((a.weights[n].codes != b.weights[n].codes).sum()) for n in a.weights)
        assert differing <= 0.01 * sum(w.codes.numel() for w in a.weights.values())
    borrowed = {report.prior_rows for report in whole[1].reports if len(report.rows) > 1}
    assert borrowed and min(borrowed) > 0
    assert not same(whole[1], next(islice(run(case, MethodConfig(reg_lambda=0.3)), 1, None)))


@pytest.mark.parametrize("method", ["sarqc-gptq", "sarqc-awq-gptq"])
def test_a_layer_of_experts_answers_once_however_it_is_cut(tiny, monkeypatch, method):
    portions = []
    collect = Collector.collect
    monkeypatch.setattr(Collector, "collect", lambda *args: portions.append(args[1][0].site.name) or collect(*args))
    answers = []
    for budget in (1 << 30, 1):
        lambda_search = LambdaSearch()
        result = list(
            run(tiny("qwen3_moe"), MethodConfig(method), gram_budget=budget, start=from_the_first(lambda_search))
        )
        answers.append({kind: (track.seen, len(track.curves)) for kind, track in lambda_search.tracks.items()})
        records = [report.held_out for block in result for report in block.reports]
        assert LambdaSearch.restored(json.loads(json.dumps(records))) == lambda_search
        for block in result:
            asked = [report for report in block.reports if len(report.rows) > 1]
            assert len(asked) == 2 and all(len(report.rows) == 4 for report in asked)
    assert answers[0] == answers[1] and len(portions) > 2 * len(set(portions))


@pytest.mark.parametrize("method", ["rtn", "sarqc-gptq", "sarqc-awq-gptq"])
def test_experts_that_are_solved_a_few_at_a_time_get_the_same_codes(tiny, monkeypatch, method):
    case = tiny("qwen3_moe")
    whole = list(run(case, MethodConfig(method)))
    monkeypatch.setitem(work_split.SOLVE_BYTES, "cpu", 1)
    for a, b in zip(whole, run(case, MethodConfig(method)), strict=True):
        for name, weight in a.weights.items():
            other = b.weights[name]
            assert all(
                torch.equal(*pair)
                for pair in ((weight.codes, other.codes), (weight.scales, other.scales), (weight.zeros, other.zeros))
            )
        for one, two in zip(a.reports, b.reports, strict=True):
            assert (one.site, one.rows, one.reg_lambda) == (two.site, two.rows, two.reg_lambda)
            assert one.error == pytest.approx(two.error, rel=1e-5)

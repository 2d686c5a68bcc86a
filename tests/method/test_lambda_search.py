"""The choice of a reg_lambda: the arithmetic of the pool exactly, then what it must bring about."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import exp, log

import pytest
import torch

from sarqc.config import MethodConfig
from sarqc.method.lambda_search import GRID, RTN, LambdaSearch, pool, prior_lambda, validation_curve

ROWS = torch.tensor([2048])
AUTO = MethodConfig()


class Bowl:
    """A judge whose answers are a parabola in log lambda, and who counts what it is asked."""

    def __init__(self, best: float, level: float = 0.5, rtn_rows: float = 2.0, bend: float = 0.2) -> None:
        self.best, self.level, self.rtn_rows, self.bend = best, level, rtn_rows, bend
        self.asked: list[float] = []
        self.turns: list[int] = []

    def losses(self, lambdas: Sequence[float], fit_fold: int) -> list[float]:
        self.asked += [reg_lambda for reg_lambda in lambdas if reg_lambda != RTN]
        self.turns.append(fit_fold)
        return [self.rtn_rows if s == RTN else self._loss(s) for s in lambdas]

    def _loss(self, reg_lambda: float) -> float:
        return self.rtn_rows * self.level * exp(self.bend * log(reg_lambda / self.best) ** 2)


def choose(lambdas, validation, spec=AUTO, kind="down", rows=ROWS):
    return lambdas.choose(kind, rows, 512, spec, validation and (lambda: validation))


def test_a_given_lambda_is_taken_as_it_is_and_nobody_is_asked():
    validation = Bowl(1.0)
    choice = choose(LambdaSearch(), validation, MethodConfig(reg_lambda=0.7), rows=torch.tensor([5, 0]))
    assert torch.equal(choice.reg_lambda, torch.tensor([0.7, 0.7])) and not validation.asked and choice.why == "given"


def test_the_rule_pulls_harder_with_fewer_rows_within_bounds():
    chosen = prior_lambda(torch.tensor([0, 64, 512, 4096, 10**9]), 512, MethodConfig())
    assert chosen[0] == 3.0 and chosen[-1] == pytest.approx(0.03)
    assert (chosen[:-1] >= chosen[1:]).all() and chosen[1] > chosen[3]
    energy, iso = (prior_lambda(ROWS, 512, MethodConfig(saliency=s)) for s in ("energy", "iso"))
    assert energy == pytest.approx(3 * iso)


def test_without_a_second_stretch_of_text_the_rule_decides():
    choice = choose(LambdaSearch(), None)
    assert (
        torch.equal(choice.reg_lambda, prior_lambda(ROWS, 512, MethodConfig()))
        and "prior" in choice.why
        and not choice.curve
    )


@pytest.mark.parametrize("best", GRID)
def test_the_least_is_found_from_wherever_the_rule_starts(best):
    """Five sites that agree outvote the rule, and the least lies between two points that were asked."""
    for rows in (10, 10**6):
        lambdas = LambdaSearch()
        choices = [choose(lambdas, Bowl(best), rows=torch.tensor([rows])) for _ in range(5)]
        assert float(choices[-1].reg_lambda) == pytest.approx(best)
        known = {s for choice in choices for s in choice.curve}
        at = GRID.index(best)
        assert known.issuperset(GRID[max(at - 1, 0) : at + 2])


def test_of_equals_the_strongest_is_taken():
    """A valley so flat that its floor is wider than a step of the grid."""
    lambdas = LambdaSearch()
    for _ in range(5):
        choice = choose(lambdas, Bowl(0.3, bend=0.02))
    assert float(choice.reg_lambda) == 1.0 and "largest" in choice.why


def test_few_lambdas_are_tried_and_each_once():
    validation = Bowl(0.3)
    curve = validation_curve([], 0.3, validation)
    assert list(curve) == [0.1, 0.3, 1.0] == validation.asked
    assert curve[0.3] == pytest.approx(0.5)


def test_the_pool_chains_what_curves_have_in_common():
    """Two curves that know different stretches: mean steps where both know, single ones elsewhere."""
    flat_rule = {GRID[i]: exp(0.03 * (i - 2) ** 2) for i in range(7)}
    one, two = {0.1: 1.0, 0.3: exp(-0.2), 1.0: exp(-0.1)}, {0.3: 1.0, 1.0: exp(0.3), 3.0: exp(0.7)}
    pooled = pool([one, two], prior=0.1)
    step = [log(flat_rule[GRID[i + 1]] / flat_rule[GRID[i]]) for i in range(6)]
    assert pooled[3] - pooled[2] == pytest.approx((-0.2 + step[2]) / 2)
    assert pooled[4] - pooled[3] == pytest.approx((0.1 + 0.3 + step[3]) / 3)
    assert pooled[5] - pooled[4] == pytest.approx((0.4 + step[4]) / 2)
    assert pooled[1] - pooled[0] == pytest.approx(step[0])


def test_kinds_do_not_know_of_each_other_and_scales_do_not_matter():
    lambdas = LambdaSearch()
    for _ in range(4):
        choose(lambdas, Bowl(0.1), kind="qkv")
        last = choose(lambdas, Bowl(3.0, level=0.01, rtn_rows=1e6), kind="down")
    assert float(last.reg_lambda) == 3.0
    assert float(choose(lambdas, Bowl(0.1), kind="qkv").reg_lambda) == pytest.approx(0.1)


def test_plain_rounding_wins_where_no_lambda_beats_it():
    lambdas = LambdaSearch()
    assert choose(lambdas, Bowl(0.3, level=1.2)).rounded
    assert not choose(lambdas, Bowl(0.3, level=0.2)).rounded  # the pool has seen better since


def test_a_site_that_held_out_text_never_excites_says_nothing():
    lambdas = LambdaSearch()
    assert not choose(lambdas, Bowl(0.3, rtn_rows=0.0)).curve
    assert not lambdas.tracks["down"].curves and lambdas.tracks["down"].seen == 1


def test_other_experts_of_a_layer_take_its_choice_or_the_same_rule():
    few = torch.tensor([16, 4096])
    asked = choose(LambdaSearch(), Bowl(0.3))
    assert torch.equal(asked.of_others(few, 512, AUTO).reg_lambda, asked.reg_lambda.expand(2))
    ruled = choose(LambdaSearch(), None)
    assert torch.equal(ruled.of_others(few, 512, AUTO).reg_lambda, prior_lambda(few, 512, AUTO))
    assert ruled.by_prior and not asked.by_prior and ruled.reg_lambda != prior_lambda(few, 512, AUTO)[0]


def test_later_sites_are_asked_now_and_then():
    lambdas = LambdaSearch()
    asked = [bool(choose(lambdas, Bowl(0.3)).curve) for _ in range(12)]
    assert asked == [True] * 4 + [False, False, True] + [False] * 5


def test_sites_take_turns_in_which_fold_they_fit_on():
    lambdas, bowls = LambdaSearch(), [Bowl(0.3) for _ in range(7)]
    for bowl in bowls:
        choose(lambdas, bowl)
    assert [set(bowl.turns) for bowl in bowls] == [{0}, {1}, {2}, {3}, set(), set(), {4}]


def test_an_interrupted_run_remembers_from_its_reports():
    """The same choices, whether the sites before were solved in this process or are read from JSON."""
    whole, choices = LambdaSearch(), []
    bowls = [Bowl(best) for best in (0.1, 3.0, 1.0, 0.3, 0.3, 10.0, 0.03, 1.0)]
    choices = [choose(whole, bowl) for bowl in bowls]
    records = [choice.record() for choice in choices]
    again = LambdaSearch.restored([{}, *json.loads(json.dumps(records[:4]))])
    for bowl, before in zip(bowls[4:], choices[4:]):
        after = choose(again, bowl)
        assert after.record() == before.record() and torch.equal(after.reg_lambda, before.reg_lambda)
    assert again == whole

"""Experts that shrinkage: the formula in fp64, its two ends, and that a layer cut in parts is the layer."""

from __future__ import annotations

from itertools import pairwise

import torch

from sarqc.config import MethodConfig, QuantConfig
from sarqc.method.gram import Gram, Statistics, prior_rows, shrink_gram
from sarqc.method.layer import solve_site

OFFSETS = torch.tensor([0, 9, 9, 10, 40])


def routed(generator: torch.Generator, size: int = 16) -> tuple[Gram, torch.Tensor]:
    x = torch.randn(40, size, generator=generator)
    gram = Gram.zeros(4, size)
    gram.add(x, OFFSETS)
    return gram, x


def test_each_expert_is_a_weighted_mean_of_its_own_and_the_pool(generator):
    gram, x = routed(generator)
    shrink_experts = shrink_gram(gram, 0.5)
    double = x.double()
    pool = double.T @ double / 40
    for expert, (start, stop) in enumerate(pairwise(OFFSETS.tolist())):
        own = double[start:stop]
        expected = (own.T @ own + 8 * pool) / (len(own) + 8)
        torch.testing.assert_close(shrink_experts.second_moment()[expert].double(), expected, rtol=1e-5, atol=1e-6)
        magnitudes = (own.abs().sum(0) + 8 * double.abs().mean(0)) / (len(own) + 8)
        torch.testing.assert_close(shrink_experts.abs_mean()[expert].double(), magnitudes, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shrink_experts.second_moment()[1].double(), pool, rtol=1e-5, atol=1e-6)


def test_nothing_borrowed_is_the_gram_itself(generator):
    gram, _ = routed(generator)
    assert shrink_gram(gram, 0.0) is gram and prior_rows(16, 0.5) == 8
    dense = Gram.zeros(1, 16)
    dense.add(torch.randn(5, 16, generator=generator))
    assert shrink_gram(dense, 0.5) is dense
    unseen = Gram.zeros(3, 16)
    assert shrink_gram(unseen, 0.5) is unseen


def test_part_of_a_layer_borrows_from_the_whole(generator):
    x = torch.randint(-4, 5, (40, 16), generator=generator).float()  # sums are exact in any order
    gram = Gram.zeros(4, 16)
    gram.add(x, OFFSETS)
    some, rest = Gram.zeros(2, 16), Gram.zeros(1, 16)
    some.add(x[9:10], torch.tensor([0, 0, 1]))
    rest.add(x[:9])
    rest.add(x[10:])
    whole, part = shrink_gram(gram, 0.25), shrink_gram(some, 0.25, rest)
    assert torch.equal(whole.second_moment()[1:3], part.second_moment())
    assert torch.equal(whole.abs_mean()[1:3], part.abs_mean())


def test_an_expert_without_tokens_is_solved_in_the_metric_of_the_pool(generator):
    gram, x = routed(generator)
    statistics, pooled = Statistics((gram,)), Statistics.zeros(1, 16)
    pooled.add(x)
    weight = torch.randn(4, 12, 16, generator=generator)
    spec, quant = MethodConfig(reg_lambda=0.3, expert_shrinkage=0.5), QuantConfig(bits=3, group_size=16)
    solved, report = solve_site("s", weight, statistics, quant, spec, scale_dtype=torch.bfloat16)
    alone, _ = solve_site("s", weight[1:2], pooled, quant, spec, scale_dtype=torch.bfloat16)
    assert (solved.codes[1] != alone.codes[0]).float().mean() < 0.05  # the pool is summed in another order
    assert report.rows == (9, 0, 1, 30) and report.prior_rows == 8

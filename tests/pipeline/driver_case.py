"""What tests of the driver share: runs of a case, its blocks one by one, statistics of solved sites."""

from __future__ import annotations

import pytest
import torch

from sarqc.config import MethodConfig, QuantConfig
from sarqc.model.layers import targets
from sarqc.model.sites import write_back
from sarqc.model.source import PatchedSource
from sarqc.pipeline import driver, quantize_site
from tests.support.blocks import run_blocks
from tests.support.by_block import call_block

QUANT = QuantConfig(bits=3, group_size=32)
AUTO = MethodConfig("sarqc-gptq", error_correction=False)
CARRY = MethodConfig("sarqc-gptq", error_correction=True)


def run(case, method=AUTO, **options):
    return run_blocks(case.lazy(), case.source, case.tokens, QUANT, method, **options)


def from_the_first(lambda_search):
    """From the first block on, adding to `lambda_search`."""
    return driver.Start(0, None, lambda _: ({}, {}), lambda_search)


def same(a, b):
    return all(torch.equal(a.weights[name].codes, b.weights[name].codes) for name in a.weights)


def entered(case):
    """A lazy model that embeds the case's tokens and calls blocks on them."""
    lazy = case.lazy()
    lazy.load_outer(case.source, torch.device("cpu"), torch.float32)
    return lazy


def block(case, lazy, index, weights, changed=None):
    """Block `index` of the original, with `weights` and what is `changed` in the place of its own, as a function of
    hidden states."""
    lazy.load_block(index, PatchedSource(case.source, {}, changed), torch.device("cpu"), torch.float32)
    for target in targets(lazy, QUANT).of_block(index):
        if target.linear in weights:
            write_back(lazy.model, target, weights[target.linear])
    return lambda hidden: call_block(lazy, index, hidden)


@pytest.fixture
def handed_over(monkeypatch):
    """Statistics of every site that was solved, by name."""
    by_site = {}
    solve_site = quantize_site.solve_site

    def spy(name, weight, statistics, *rest, **options):
        by_site[name] = statistics
        return solve_site(name, weight, statistics, *rest, **options)

    monkeypatch.setattr(quantize_site, "solve_site", spy)
    return by_site

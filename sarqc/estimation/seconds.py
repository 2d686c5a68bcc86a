"""How long a run will take: what it computes, counted from shapes, over rates that `rates` measures on this machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sarqc.config import AUTO, MethodConfig
from sarqc.estimation import shapes
from sarqc.estimation.rates import Rates, measure, products
from sarqc.method.error_correction import SHARE_ROWS
from sarqc.method.lambda_search import EXPERTS, MEASURED_EVERY, MEASURED_FIRST, ROWS
from sarqc.model.sites import Site, SiteChunk
from sarqc.pipeline.plan import Plan
from sarqc.pipeline.sensitivity import TOKENS as OBSERVED
from sarqc.pipeline.sensitivity import TRIED_LENGTH, TRIED_WINDOWS
from sarqc.pipeline.work_split import cost, work_items

FOLDS = 2
CALLS = 40
"""Calls of modules and functions that a micro-batch takes through a block, beside those of its experts."""
EXPERT_CALLS = 12
"""The same of an expert that some of its tokens visit."""
LOOKS = 12
"""Runs of a block on a few tokens, to find its sites and where they join the stream."""
TRIED = 4
"""Lambdas that are tried at a site."""
ACTIVATION_PASSES = 20
"""Passes over activations of the widest layer that a block takes beside its products."""
LOAD_PASSES, WRITE_PASSES = 12, 25
"""Passes over a weight that loading takes, and packing, writing and verifying."""
WRITE_CALLS, VERIFY_CALLS = 120, 1000
"""Calls beside them that a layer takes, and that verifying takes for each block of the model that it builds."""


@dataclass(frozen=True)
class Time:
    """Seconds of each stage, and what they are reckoned from."""

    seconds: dict[str, float]
    basis: str

    @property
    def total(self) -> float:
        """Seconds of the run."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Text:
    """Calibration text of one rank: `windows` sequences of `length` tokens in `batches` micro-batches."""

    windows: int
    length: int
    batches: int

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.windows * self.length


def seconds(plan: Plan, windows: int, seqlen: int, ranks: int = 1) -> Time:
    """Predicted seconds of the blocks on `ranks` machines like this one."""
    rates, method = measure(plan), plan.method
    own = -(-windows // ranks)  # of the busiest rank
    text = Text(own, seqlen, -(-own // plan.micro_batch(seqlen)) if own else 0)
    spent = dict.fromkeys(("load", "reference", "forward", "solve", "write"), 0.0)
    if plan.quant.avg_bits is not None:
        spent["sensitivity"] = 0.0
    blocks = [shapes.merged_sites(sites) for _, sites in shapes.blocks(plan)]
    count = len(plan.lazy.blocks)
    for index, sites in enumerate(blocks):
        forward = forward_seconds(plan, sites, text, rates) if index < count else 0.0  # nothing runs behind a head
        text_passes = windows > 0 and index < plan.lazy.passed
        solving = sum(solve_seconds(plan, site, rates, ranks, gram=text_passes) for site in sites)
        if text_passes:
            times = 2 if method.channel_scales else 1  # scales are searched for in a run of the block that is dropped
            grams = sum(gram_seconds(plan, site, text, rates) for site in sites)
            looks = LOOKS * _calls(plan, sites) * rates.call
            spent["forward"] += times * (forward + grams) + looks
            spent["reference"] += method.error_correction * forward
            solving += sum(correction_seconds(site, rates, ranks) for site in sites if site.residual_write)
            if method.reg_lambda == AUTO and windows > 1:
                solving += measured_share(count if index < count else 1) * sum(
                    lambda_seconds(site, method, rates, ranks) for site in sites
                )
        spent["solve"] += solving
        if plan.device.type == "cpu":
            passed = sum(site.experts * site.rows * site.in_features for site in sites) / rates.stream
            spent["load"] += LOAD_PASSES * passed
            spent["write"] += WRITE_PASSES * passed
            calls = WRITE_CALLS * len(plan.targets.of_block(index)) + VERIFY_CALLS * (index < count)
            spent["write"] += calls * rates.call
        if plan.quant.avg_bits is not None:
            spent["sensitivity"] += sensitivity_seconds(plan, sites, count, text, rates) / ranks
    exclusion = f", nor what {ranks} ranks tell each other" if ranks > 1 else ""
    return Time(spent, f"{rates}, measured on {plan.device}; disk not counted{exclusion}")


def forward_seconds(plan: Plan, sites: list[Site], text: Text, rates: Rates) -> float:
    """Seconds that all micro-batches take through a block."""
    hidden, widest = plan.lazy.hidden_size, max((site.rows for site in sites), default=0)
    flops = sum(2.0 * visits(plan, site) * site.rows * site.in_features for site in sites) + 2.0 * text.length * hidden
    moved = ACTIVATION_PASSES * max(hidden, widest)
    return (
        text.tokens * (flops / rates.forward + moved / rates.stream) + text.batches * _calls(plan, sites) * rates.call
    )


def gram_seconds(plan: Plan, site: Site, text: Text, rates: Rates) -> float:
    """Seconds of a site's Grams, and of what a layer that corrects the residual error is handed."""
    rows = text.tokens * visits(plan, site)
    spent = 2.0 * rows * site.in_features**2 / rates.gram + text.batches * min(site.experts, 2) * rates.call
    if site.residual_write:  # a cross Gram, and the correction of what has left the layer
        flops = 2.0 * rows * site.rows * site.in_features
        spent += flops / rates.product + flops / rates.forward
    return spent


def solve_seconds(plan: Plan, site: Site, rates: Rates, ranks: int, *, gram: bool) -> float:
    """Seconds that the rank with most to do takes for a site's codes; a dense layer is factored on every rank."""
    if site.members[0].embedding:
        return rates.element * site.rows * site.in_features
    one = rates.solve(site.rows, site.in_features, products(plan.method))
    if site.experts > 1 or not gram:
        return site.experts * one * busiest(site, ranks, plan.device, gram=gram)
    shared = rates.factor(site.in_features)
    return shared + (one - shared) / ranks


def correction_seconds(site: Site, rates: Rates, ranks: int) -> float:
    """Seconds of the shift of each fold and of all: a factor and two triangular solves, the last of them by rows.

    Ranks deal the factors, that of the solver among them, which `solve_seconds` has.
    """
    factor, solves = rates.factor(site.in_features), 4.0 * site.rows * site.in_features**2 / rates.product
    sampled = solves * min(1.0, SHARE_ROWS / site.rows)  # of a fold, by a sample of rows
    turns = -(-(FOLDS + 2) // ranks)
    return (turns - 1) * factor + min(FOLDS, turns) * sampled + solves / ranks


def lambda_seconds(site: Site, method: MethodConfig, rates: Rates, ranks: int) -> float:
    """Seconds of the trials of a site at which lambda is measured; ranks share them."""
    trial = rates.solve(min(ROWS, site.rows), site.in_features, min(1, products(method)))
    return -(-TRIED * min(site.experts, EXPERTS) // ranks) * trial


def measured_share(sites: int) -> float:
    """Of the sites of a kind, the share at which lambda is measured."""
    return (
        min(sites, MEASURED_FIRST) + len(range(0, sites, MEASURED_EVERY)[-(-MEASURED_FIRST // MEASURED_EVERY) :])
    ) / sites


def sensitivity_seconds(plan: Plan, sites: list[Site], blocks: int, text: Text, rates: Rates) -> float:
    """Seconds of a block's sensitivity: it is observed, and of each site so far a few sequences go through it."""
    length = text.length or 1
    windows = max(1, min(text.windows, OBSERVED // length))
    observed = Text(windows, length, windows)
    tried = Text(TRIED_WINDOWS, TRIED_LENGTH, 1)
    streams = len(sites) * blocks / 2
    solving = sum(min(site.experts, EXPERTS) * rates.factor(site.in_features) for site in sites)
    grams = sum(gram_seconds(plan, site, observed, rates) for site in sites)
    return (
        2 * forward_seconds(plan, sites, observed, rates)
        + grams
        + streams * forward_seconds(plan, sites, tried, rates)
        + 3 * solving
    )


def busiest(site: Site, ranks: int, device: torch.device, *, gram: bool) -> float:
    """Part of a site's matrices that falls to the rank that has most of them."""
    loads = [0.0] * ranks
    for item in work_items([SiteChunk(site, 0, site.experts)], ranks, device, gram=gram):
        loads[item.owner] += cost(item.chunk)
    return max(loads) / max(sum(loads), 1.0)


def _calls(plan: Plan, sites: list[Site]) -> float:
    """Calls that a micro-batch takes through a block."""
    return CALLS + EXPERT_CALLS * max((site.experts for site in sites if site.experts > 1), default=0)


def visits(plan: Plan, site: Site) -> int:
    """Experts of a site that a token passes through."""
    return min(site.experts, shapes.choices(plan)) if site.experts > 1 else 1

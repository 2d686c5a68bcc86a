"""What the forecasts read off a plan: bytes, elements and sites, from names and shapes alone."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from sarqc.model.sites import ResidualWrite, Site, separate_sites
from sarqc.pipeline.plan import Plan


def stored_bytes(plan: Plan, name: str) -> int:
    """Bytes of a tensor in the checkpoint."""
    return prod(plan.source.shape(name)) * plan.source.dtype(name).itemsize


def elements(plan: Plan, parameter: str) -> int:
    """Elements of a parameter of the model."""
    return int(plan.lazy.model.get_parameter_or_buffer(parameter).numel())


def blocks(plan: Plan) -> list[tuple[int, list[Site]]]:
    """Sites of every unit as shapes tell them, at least as many as a forward will show, with the residual writes that
    are likely."""
    return [
        (index, _writing(plan, separate_sites(plan.lazy, plan.targets.of_block(index))))
        for index in range(len(plan.lazy.units))
    ]


def merged_sites(sites: list[Site]) -> list[Site]:
    """The sites as a forward is likely to show them: Linears of one module with equally many inputs read one tensor."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        read = site.name if site.residual_write or site.experts > 1 else site.name.rpartition(".")[0]
        groups.setdefault((read, site.in_features), []).append(site)
    return [
        replace(first, members=sum((one.members for one in (first, *others)), ())) for first, *others in groups.values()
    ]


def _writing(plan: Plan, sites: list[Site]) -> list[Site]:
    """By names, which a forward might prove wrong: down_proj of a dense layer ends its block, o_proj joins the stream
    inside it. With channel scales only one of them corrects the error."""
    if not plan.method.error_correction:
        return sites
    dense = {site.name.rpartition(".")[2]: site for site in sites if site.experts == 1}
    places = {"down_proj": ResidualWrite(None), "o_proj": ResidualWrite("the norm behind it")}
    likely = {dense[name].name: place for name, place in places.items() if name in dense}
    if plan.method.channel_scales:
        likely = dict(list(likely.items())[:1])
    return [replace(site, residual_write=likely.get(site.name)) for site in sites]


def choices(plan: Plan) -> int:
    """Experts that a token passes through."""
    return int(getattr(plan.lazy.text_config, "num_experts_per_tok", None) or 1)


def states_bytes(plan: Plan, windows: int, seqlen: int) -> int:
    """Bytes of the hidden states of `windows` windows."""
    return windows * seqlen * plan.lazy.hidden_size * plan.dtype.itemsize

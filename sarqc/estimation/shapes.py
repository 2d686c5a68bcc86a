"""What the forecasts read off a plan: bytes, elements and sites, from names and shapes alone."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from sarqc.model.sites import ResidualWrite, Site, separate_sites
from sarqc.pipeline.plan import Plan


def stored_bytes(plan: Plan, name: str) -> int:
    """Bytes of a tensor in the checkpoint."""
    return prod(plan.source.shape(name)) * plan.source.dtype(name).itemsize


def elements(plan: Plan, parameter: str) -> int:
    """Elements of a parameter of the model."""
    return int(plan.lazy.model.get_parameter_or_buffer(parameter).numel())


def blocks(plan: Plan) -> list[tuple[int, list[Site]]]:
    """Sites of every block as shapes tell them, at least as many as a forward will show; one has the residual write
    that it is likely to have.
    """
    return [
        (index, _joined(plan, separate_sites(plan.lazy, plan.targets.of_block(index))))
        for index in range(len(plan.lazy.blocks))
    ]


def _joined(plan: Plan, sites: list[Site]) -> list[Site]:
    """By names, which a forward might prove wrong: down_proj ends its block; o_proj does not, where experts follow."""
    dense = {site.name.rpartition(".")[2]: site for site in sites if site.experts == 1}
    likely = dense.get("down_proj", dense.get("o_proj")) if plan.method.error_correction else None
    residual_write = ResidualWrite(None if "down_proj" in dense else "the norm behind it")
    return [replace(site, residual_write=residual_write) if site is likely else site for site in sites]


def choices(plan: Plan) -> int:
    """Experts that a token passes through."""
    return int(getattr(plan.lazy.text_config, "num_experts_per_tok", None) or 1)


def hidden_size(plan: Plan) -> int:
    """Numbers in a hidden state."""
    return plan.lazy.hidden_size


def states_bytes(plan: Plan, windows: int, seqlen: int) -> int:
    """Bytes of the hidden states of so many windows."""
    return windows * seqlen * hidden_size(plan) * plan.dtype.itemsize

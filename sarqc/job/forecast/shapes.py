"""What the forecasts read off a plan: bytes, elements and sites, from names and shapes alone."""

from __future__ import annotations

from math import prod

from sarqc.job.plan import Plan
from sarqc.model.sites import Site, separate_sites


def stored_bytes(plan: Plan, name: str) -> int:
    """Bytes of a tensor in the checkpoint."""
    return prod(plan.source.shape(name)) * plan.source.dtype(name).itemsize


def elements(plan: Plan, parameter: str) -> int:
    """Elements of a parameter of the model."""
    return int(plan.skeleton.model.get_parameter_or_buffer(parameter).numel())


def blocks(plan: Plan) -> list[tuple[int, list[Site]]]:
    """Sites of every block as shapes tell them: at least as many as a forward will show."""
    return [
        (index, separate_sites(plan.skeleton, plan.targets.of_block(index)))
        for index in range(len(plan.skeleton.blocks))
    ]


def choices(plan: Plan) -> int:
    """Experts that a token passes through."""
    return int(getattr(plan.skeleton.model.config, "num_experts_per_tok", None) or 1)


def hidden_size(plan: Plan) -> int:
    """Numbers in a hidden state."""
    return int(plan.skeleton.model.config.hidden_size)


def states_bytes(plan: Plan, windows: int, seqlen: int) -> int:
    """Bytes of the hidden states of so many windows."""
    return windows * seqlen * hidden_size(plan) * plan.dtype.itemsize

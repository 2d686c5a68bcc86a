"""A forward that enters a model in its middle with stored hidden states, and how it is told where that is not right."""

from __future__ import annotations

import pytest
import torch

from sarqc.model import moe
from sarqc.pipeline.forward import Forward
from sarqc.pipeline.points import Hooks, Point
from sarqc.pipeline.stored_states import fingerprint, output_form, replaying
from tests.pipeline.classes import CONFIGS, blocks_of, build, windows
from tests.pipeline.test_forward import END, calls_of, plain

CARRYING = {"gemma3n", "gemma4"}
"""Classes whose later blocks read keys and values of earlier ones."""


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_handed_on_states_give_the_same_logits_or_another_fingerprint(name):
    model = build(name)
    moe.use_sorted_experts(model)
    blocks, batches = blocks_of(model), windows()
    first = len(blocks) - 1
    expected = plain(model, batches)
    with Hooks(blocks), Forward(calls_of(model, batches), blocks) as forward:
        leaving = list(forward.leave(first - 1))
        hidden, form = [arrival.x.clone() for arrival in leaving], output_form(leaving[0])
        stored = [fingerprint(arrival) for arrival in forward.at(Point("enter", first))]
    assert form is not None
    with Hooks(blocks), Forward(calls_of(model, batches), blocks, first=first) as forward:
        with replaying(blocks, first, form, hidden.__getitem__):
            met = [fingerprint(arrival) for arrival in forward.at(Point("enter", first))]
        assert (met == stored) == (name not in CARRYING)
        if met == stored:
            actual = [arrival.output for arrival in forward.at(Point(END, len(blocks)))]
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert all(type(block).__name__ != "ReplayBlock" for block in blocks)


def test_a_fingerprint_is_of_everything_but_the_stream():
    model, batches = build("gemma2"), windows(2)
    with Hooks(blocks_of(model)), Forward(calls_of(model, batches), blocks_of(model)) as forward:
        one, other = forward.at(Point("enter", 1))
        assert fingerprint(one) == fingerprint(other) and not torch.equal(one.x, other.x)
        before = fingerprint(one)
        other.kwargs["position_embeddings"][0][0, 3, 2] += 1e-3
        assert fingerprint(other) != before and fingerprint(one) == before

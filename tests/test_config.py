"""Specs check themselves, survive JSON, and methods are one table."""

from __future__ import annotations

import json

import pytest

from sarqc.config import ABOUT, METHODS, QuantSpec, SolveSpec, from_json, solve_spec, to_json
from sarqc.errors import ArgumentError


@pytest.mark.parametrize("spec", [*METHODS.values(), QuantSpec(bits=3, group_size=-1, ignore=("a", "b"))])
def test_a_spec_survives_json(spec):
    assert from_json(type(spec), json.loads(json.dumps(to_json(spec)))) == spec


def test_every_method_is_named_and_described():
    assert list(METHODS) == list(ABOUT) and all(spec.method == name for name, spec in METHODS.items())
    assert len(set(ABOUT.values())) == len(ABOUT)
    assert list(METHODS) == [
        "rtn", "rtn-search", "awq", "rqc-awq", "sarqc-awq", "gptq", "rqc-gptq", "sarqc-gptq", "sarqc"
    ]  # fmt: skip


def test_plain_methods_are_plain():
    """Baselines have no regulariser of ours; GPTQ's own damping is 1 % of the mean diagonal."""
    assert all(METHODS[name].strength == 0 for name in ("rtn", "rtn-search", "awq"))
    gptq = METHODS["gptq"]
    assert (gptq.strength, gptq.saliency, gptq.grid, gptq.act_order) == (0.01, "iso", "minmax", "static")
    assert {name for name, spec in METHODS.items() if spec.channel_scale} == {"awq", "rqc-awq", "sarqc-awq", "sarqc"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"solver": "guess"}, "solver = 'guess'"),
        ({"method": "rtn", "solver": "gram"}, "gram = False"),
        ({"method": "rtn", "channel_scale": True}, "gram = False"),
        ({"saliency": "power:5"}, "power:5"),
    ],
)
def test_what_does_not_fit_is_refused(changes, says):
    with pytest.raises(ArgumentError, match=says):
        solve_spec(**changes)


def test_an_unknown_key_is_named():
    with pytest.raises(ArgumentError, match="'sover'"):
        from_json(SolveSpec, {"sover": "gram"})


def test_one_alone_is_one_of_several():
    """A string is not its letters."""
    assert QuantSpec(ignore="down_proj").ignore == ("down_proj",)
    assert QuantSpec(avg_bits=4.5, choices=4).choices == (4,)


@pytest.mark.parametrize("given", [{"strength": 0.3}, {"saliency": "rms"}, {"borrow": 0.5}, {"gate_weight": 1}])
def test_a_method_without_text_takes_nothing_that_is_about_text(given):
    with pytest.raises(
        ArgumentError, match=rf"{next(iter(given))} = .* is not for method 'rtn', which looks at no text"
    ):
        solve_spec("rtn", **given)

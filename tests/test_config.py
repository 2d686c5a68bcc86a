"""The options of `sarqc quantize` and `sarqc compare`: their values, the methods, and what is made from the fields."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from torch import Tensor

from sarqc import config, keywords
from sarqc.checkpoint.formats import FORMATS
from sarqc.config import QUANTIZE, CalibrationConfig, MethodConfig, QuantConfig, RunConfig
from sarqc.config_compare import COMPARE, EVALUATE, ComparisonConfig, EvaluationConfig, MeasureConfig
from sarqc.errors import ArgumentError
from sarqc.methods import CALIBRATION, DEFAULT_METHOD, EFFORTS, METHODS
from sarqc.options import (
    RenamedWarning,
    annotations_of,
    arguments,
    command_words,
    default_of,
    from_record,
    may_change,
    options,
    record,
    split_by_config,
)
from sarqc.quant_config import BIT_OPTIONS
from tests.support import keywords as written

EVERY = (*QUANTIZE, *COMPARE, *EVALUATE)


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_option_says_what_it_is(kind):
    fields = [field.name for field in dataclasses.fields(kind)]
    assert len(fields) <= 12 and list(options(kind)) == fields
    for name, one in options(kind).items():
        assert one.help.endswith(".") and one.kind.accepted, name
        assert all(len(sentence.split()) <= 25 for sentence in re.split(r"[.:] ", one.help)), name
    assert kind.panel and dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen


def test_no_name_is_used_twice():
    for kinds in (QUANTIZE, COMPARE, EVALUATE):
        names = [name for kind in kinds for name in options(kind)]
        flags = [flag for kind in kinds for name, one in options(kind).items() for flag in one.flags(name)]
        old = [name for kind in kinds for one in options(kind).values() for name in (*one.old, *one.old_opposite)]
        assert len({*names, *old}) == len(names) + len(old) and len(set(flags)) == len(flags)


# -- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 1}, "bits = 1 "),
        ({"bits": 9}, "bits = 9 "),
        ({"bits": "4"}, "bits = '4'"),
        ({"bits": True}, "bits = True"),
        ({"group_size": 0}, "group_size = 0"),
        ({"group_size": True}, "group_size = True"),
        ({"group_size": "128"}, "group_size = '128'"),
        ({"avg_bits": 1.5}, "avg_bits = 1.5"),
        ({"avg_bits": "3"}, "avg_bits = '3'"),
        ({"bit_options": (3, 4)}, "bit_options"),
        ({"avg_bits": 3, "bit_options": (3, 9)}, "bit_options"),
        ({"avg_bits": 3.5, "bits": 3}, "bits = 3 and avg_bits = 3.5"),
        ({"ignore": "("}, "ignore = "),
        ({"sym": "no"}, "sym = 'no'"),
        ({"tp": 0}, "tp = 0"),
        ({"format": 3}, "format = 3"),
    ],
)
def test_a_number_format_is_checked(given, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        QuantConfig(**given)


def test_mixed_widths():
    mixed = QuantConfig(avg_bits=3.5)
    assert mixed.bits == 4 and mixed.bit_options == BIT_OPTIONS
    assert QuantConfig(avg_bits=3.5, bit_options=[8, 3, 3, 2]).bit_options == (2, 3, 8)
    assert QuantConfig(avg_bits=9, bit_options=4).bits == 4
    assert dataclasses.replace(mixed, group_size=64).bits == 4
    assert mixed.at(3) == QuantConfig(bits=3)


def test_bits_beside_avg_bits_are_refused():
    """Both given is refused even where bits is the default, which the object alone cannot see."""
    with pytest.raises(ArgumentError, match=r"bits = 4 and avg_bits = 3\.5"):
        QuantConfig.made(None, split_by_config(QUANTIZE, {"bits": 4, "avg_bits": 3.5})[QuantConfig])


def test_groups_of_a_layer():
    assert QuantConfig(group_size=32).groups(96) == 3 and QuantConfig(group_size=-1).groups(96) == 1
    assert QuantConfig(group_size=-1).columns_per_group(96) == 96
    for size in (64, "auto"):
        with pytest.raises(ArgumentError, match="group_size"):
            QuantConfig(group_size=size).groups(96)


def test_help_names_every_format():
    assert all(name in options(QuantConfig)["format"].help for name in FORMATS)


# -- methods ----------------------------------------------------------------------------------------------------------


def test_the_methods():
    assert list(METHODS) == [
        "rtn", "rtn-search", "awq", "rqc-awq", "sarqc-awq", "gptq", "rqc-gptq", "sarqc-gptq", "sarqc-awq-gptq"
    ]  # fmt: skip
    assert len({row.about for row in METHODS.values()}) == len(METHODS)
    assert {name for name, row in METHODS.items() if row.channel_scales} == {
        "awq", "rqc-awq", "sarqc-awq", "sarqc-awq-gptq"
    }  # fmt: skip
    assert [name for name, row in METHODS.items() if not row.calibrated] == ["rtn"]
    for row in METHODS.values():
        assert row.own.keys() <= options(MethodConfig).keys()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_complete_when_made(name):
    made = MethodConfig(name)
    assert all(getattr(made, field) is not None for field in options(MethodConfig))
    assert dataclasses.replace(made) == made == from_record(MethodConfig, json.loads(json.dumps(record(made))))


def test_plain_methods_are_plain():
    """Baselines have no regulariser of ours; GPTQ's own damping is 1 % of the mean diagonal."""
    assert all(MethodConfig(name).reg_lambda == 0 for name in ("rtn", "rtn-search", "awq"))
    gptq = MethodConfig("gptq")
    assert (gptq.reg_lambda, gptq.saliency, gptq.scales, gptq.act_order, gptq.damp) == (
        0.01, "iso", "minmax", "static", 0
    )  # fmt: skip
    assert not gptq.needs_validation and MethodConfig().needs_validation


def test_none_is_the_methods_own():
    assert MethodConfig("gptq", reg_lambda=None) == MethodConfig("gptq")
    assert MethodConfig("gptq", reg_lambda=0.3).reg_lambda == 0.3


def test_effort_sets_own_values_and_given_options_win():
    fast, best = MethodConfig(effort="fast"), MethodConfig(effort="best")
    assert (fast.reg_lambda, fast.cd_passes, fast.error_correction) == ("prior", 0, False)
    assert not fast.needs_validation and best.cd_passes > MethodConfig().cd_passes
    assert MethodConfig(effort="fast", cd_passes=1, reg_lambda="auto").needs_validation
    assert MethodConfig(effort="fast", cd_passes=1).cd_passes == 1
    for name, row in METHODS.items():
        for effort in EFFORTS if row.calibrated else ():
            method_config = MethodConfig(name, effort)
            assert from_record(MethodConfig, record(method_config)) == dataclasses.replace(
                method_config, effort="default"
            )
            assert method_config.cd_passes == 0 or MethodConfig(name).cd_passes > 0, (
                "a method gets what it is not made of"
            )
    with pytest.raises(ArgumentError, match="effort = 'fast' has no effect with method 'rtn'"):
        MethodConfig("rtn", "fast")


def test_another_effort_changes_what_a_configuration_left_out():
    base = MethodConfig(cd_passes=2)
    assert MethodConfig.made(base, {"effort": "fast"}) == MethodConfig(effort="fast", cd_passes=2)
    assert MethodConfig.made(MethodConfig(), {"effort": "fast", "cd_passes": 1}).reg_lambda == "prior"
    assert MethodConfig.made(base, {"damp": 0.1}).error_correction


def test_the_default_in_help_follows_the_methods():
    text = MethodConfig.default_text("reg_lambda")
    assert text == "auto; 0 for rtn-search, awq; 0.01 for gptq"
    assert MethodConfig.default_text("error_correction") == "off; on for sarqc-gptq, sarqc-awq-gptq"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "guess"}, "method = 'guess'"),
        ({"method": 3}, "method = 3"),
        ({"saliency": "power:5"}, "saliency = 'power:5'"),
        ({"saliency": "power"}, "saliency = 'power'"),
        ({"reg_lambda": "much"}, "reg_lambda = 'much'"),
        ({"effort": "all"}, "effort = 'all'"),
        ({"reg_lambda": -1}, "reg_lambda = -1"),
        ({"reg_lambda": float("inf")}, "reg_lambda = inf"),
        ({"cd_passes": -1}, "cd_passes = -1"),
        ({"cd_passes": 1.0}, "cd_passes = 1.0"),
        ({"error_correction": 1}, "error_correction = 1"),
        ({"router_weight_power": 3}, "router_weight_power = 3"),
        ({"damp": 1}, "damp = 1"),
        ({"scales": "best"}, "scales = 'best'"),
        ({"act_order": "desc"}, "act_order = 'desc'"),
        ({"method": "rtn-search", "cd_passes": 1}, "cd_passes = 1 has no effect with method 'rtn-search'"),
        ({"method": "awq", "error_correction": True}, "error_correction = True has no effect with method 'awq'"),
    ],
)
def test_a_method_is_checked(given, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        MethodConfig(**given)


@pytest.mark.parametrize(
    "given", [{"reg_lambda": 0.3}, {"saliency": "rms"}, {"expert_shrinkage": 0.5}, {"router_weight_power": 1}]
)
def test_a_method_without_data_takes_nothing_that_is_about_data(given):
    with pytest.raises(ArgumentError, match=f"{next(iter(given))} = .*'rtn', which has no {CALIBRATION}"):
        MethodConfig("rtn", **given)
    assert MethodConfig("rtn-search", **given) != MethodConfig("rtn-search")


def test_the_earlier_name_of_a_method():
    with pytest.warns(RenamedWarning, match="method sarqc is now sarqc-awq-gptq"):
        assert MethodConfig("sarqc").method == "sarqc-awq-gptq"


# -- calibration data and the run -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (CalibrationConfig, {"seed": -1}, "seed = -1"),
        (CalibrationConfig, {"seed": 1 << 63}, "seed = "),
        (CalibrationConfig, {"seqlen": 8}, "seqlen = 8"),
        (CalibrationConfig, {"num_samples": 0}, "num_samples = 0"),
        (CalibrationConfig, {"dataset": 5}, "dataset = 5"),
        (CalibrationConfig, {"dataset": ""}, "dataset = ''"),
        (RunConfig, {"gram_budget": 0}, "gram_budget = 0"),
        (RunConfig, {"gram_budget": 0.5}, "gram_budget = 0.5"),
        (RunConfig, {"activation_budget": -1}, "activation_budget = -1"),
        (RunConfig, {"micro_batch": 0}, "micro_batch = 0"),
        (RunConfig, {"dtype": "int8"}, "dtype = 'int8'"),
        (RunConfig, {"device": 0}, "device = 0"),
        (RunConfig, {"work_dir": 3}, "work_dir = 3"),
        (RunConfig, {"resume": "no"}, "resume = 'no'"),
        (ComparisonConfig, {"bits": (4, 1)}, "bits = (4, 1)"),
        (ComparisonConfig, {"methods": 3}, "methods = 3"),
        (ComparisonConfig, {"seqlen": 8}, "seqlen = 8"),
        (MeasureConfig, {"eval_windows": 0}, "eval_windows = 0"),
        (EvaluationConfig, {"max_windows": 0}, "max_windows = 0"),
        (EvaluationConfig, {"packed": 1}, "packed = 1"),
    ],
)
def test_the_rest_is_checked(kind, given, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        kind(**given)


def test_tokens_are_data():
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    assert CalibrationConfig(tokens).dataset is tokens


def test_what_a_resumed_run_may_change():
    """Nothing that the result depends on."""
    free = may_change(QUANTIZE)
    assert {"format", "device", "micro_batch", "gram_budget", "activation_budget", "tp", "ordered"} <= set(free)
    assert set(free).isdisjoint({*options(MethodConfig), "bits", "avg_bits", "group_size", "sym", "ignore", "seed"})
    assert record(QuantConfig(tp=2, format="awq")).keys() == {"bits", "group_size", "sym"}
    assert record(CalibrationConfig(num_samples=3)) == {"seed": 0}
    assert record(RunConfig(device="cpu")) == {}


# -- made from the fields -----------------------------------------------------------------------------------------


def test_the_keywords_that_editors_know_are_the_options():
    assert written.PLACE.read_text(encoding="utf-8") == written.source(), "run `make keywords`"
    names = {"Tensor": Tensor, "Path": Path, "Sequence": Sequence}
    for whole, kinds in (
        (keywords.QuantizeKeywords, QUANTIZE),
        (keywords.CompareKeywords, COMPARE),
        (keywords.EvaluationKeywords, EVALUATE),
    ):
        expected = {name for kind in kinds for name in options(kind)} - {"method"}
        assert get_type_hints(whole, localns=names).keys() == expected


def accepts(one, value) -> bool:
    try:
        one.keep("it", value)
    except ArgumentError:
        return False
    return True


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_an_annotation_says_what_the_check_takes(kind):
    """They are two texts of one field: words and values of every part of the annotation are tried."""
    samples = {"int": (2, 16, 64), "float": (0.5, 3.5), "bool": (True,), "str": ("auto", "iso", "gptq", "awq")}
    for name, annotation in annotations_of(kind).items():
        one = options(kind)[name]
        for part in annotation.split(" | "):
            if part.startswith("Literal["):
                assert all(accepts(one, word) for word in re.findall(r'"([^"]+)"', part)), name
            elif part in samples:
                assert any(accepts(one, value) for value in samples[part]), name
        if not re.search(r"str|Literal|Any", annotation):
            assert not accepts(one, "auto"), name
        if not re.search(r"bool|Any", annotation):
            assert not accepts(one, True), name
        if "None" in annotation:
            assert default_of(kind, name) is None, name


def test_arguments_name_every_option():
    text = arguments(QUANTIZE)
    assert all(f"    {name}: " in text for kind in QUANTIZE for name in options(kind))
    assert max(map(len, text.splitlines())) <= 120 and "In bytes" in text


def test_a_command_repeats_a_configuration():
    words = command_words(QuantConfig, record(QuantConfig(bits=3, sym=False, ignore=("a", "b c"))))
    assert words == ["--bits", "3", "--asym", "--ignore", "a", "--ignore", "b c"]
    given = record(MethodConfig(reg_lambda=0.25, error_correction=False))
    own = record(MethodConfig())
    assert command_words(MethodConfig, given, own) == ["--reg-lambda", "0.25", "--no-error-correction"]
    assert command_words(QuantConfig, {"avg_bits": 3.5, "bit_options": (4, 8)}) == [
        "--avg-bits", "3.5", "--bit-options", "4,8"
    ]  # fmt: skip


def test_the_configurations_import_nothing_heavy():
    source = inspect.getsource(config) + inspect.getsource(keywords)
    assert "import torch" not in source
    assert DEFAULT_METHOD in METHODS

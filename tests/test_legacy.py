"""Reports of earlier versions are read as those of this one."""

from __future__ import annotations

import json

import pytest

from sarqc import legacy
from sarqc.config import METHODS, MethodConfig
from sarqc.options import from_record, record
from sarqc.report import model_card
from sarqc.report import report as reports
from tests.support import tiny

OLD = {
    "reg_lambda": "reg_lambda",
    "cd_passes": "sweeps",
    "error_correction": "carry_error",
    "expert_shrinkage": "borrow",
    "router_weight_power": "gate_weight",
    "scales": "grid",
}


def solve_of(config: MethodConfig, seed: int = 5) -> dict[str, object]:
    """What version 0.2 wrote of a method: presets had fields of their own for what a name says now."""
    values = {OLD.get(name, name): value for name, value in record(config).items()}
    name = "sarqc" if config.method == "sarqc-awq-gptq" else config.method
    solver = "round" if config.solver == "rtn" else "gram"
    own = {"gram": config.calibrated, "solver": solver, "channel_scale": config.channel_scales, "seed": seed}
    return values | own | {"method": name}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_an_earlier_record_is_the_method(name):
    config = MethodConfig(name)
    assert from_record(MethodConfig, legacy.method(json.loads(json.dumps(solve_of(config))))) == config


def test_an_earlier_report_is_shown_and_repeated(tmp_path):
    import sarqc

    source = tiny.save("llama", tmp_path / "model")
    options = {"num_samples": 4, "seqlen": 32, "group_size": 32, "seed": 5, "reg_lambda": 0.5}
    quantized = sarqc.quantize(source, tmp_path / "out", **options)
    new = reports.load(quantized.out)
    old = {key: value for key, value in new.items() if key != "method"}
    old["solve"] = solve_of(from_record(MethodConfig, new["method"]))
    old["quant"] = new["quant"] | {"ignore": []}
    old["calibration"] = {key: value for key, value in new["calibration"].items() if key != "seed"}
    (quantized.out / "report.json").write_text(json.dumps(old))
    again = reports.load(quantized.out)
    assert again["method"] == new["method"] and again["calibration"] == new["calibration"]
    assert model_card.command(again) == model_card.command(new)
    assert "--reg-lambda 0.5" in model_card.command(again) and "--seed 5" in model_card.command(again)
    reports.rebuild(quantized.out)


def test_what_is_no_record_is_left_for_the_check():
    assert legacy.report({"quant": 3, "solve": [1]}) == {"quant": 3, "solve": [1]}

"""A checkpoint, its manifest and its report as the first form of this program wrote them: all are read.

tests/data/first_form was written by version 0.2 (commit 1094a4b) from a random Llama of two blocks:
`quantize(..., method="sarqc", bits=3, group_size=32, sym=False, strength=0.3, sweeps=1, carry_error=True)`.
"""

from __future__ import annotations

import json
import shutil
from html import escape
from pathlib import Path

import pytest
import torch

import sarqc
from sarqc.entrypoints.inspect import inspect
from sarqc.report import report as reports
from sarqc.report.summary import verdict

STORED = Path(__file__).parent / "data" / "first_form"
LOGITS = [0.0, -0.0618, -0.0747, 0.1787, -0.0047, -0.1011]
"""The first of the last token, as version 0.2 computed them."""


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(STORED, tmp_path / "old"))


def test_its_bytes_are_those_of_its_manifest(folder):
    verified = sarqc.verify(folder)
    assert verified.sound and verified.record()["manifest"], verified.problems
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert not sarqc.verify(folder).sound


def test_its_report_has_todays_names(folder):
    content = reports.load(folder)
    method = content["method"]
    assert (method["method"], method["reg_lambda"], method["cd_passes"]) == ("sarqc-awq-gptq", 0.3, 1)
    assert method["error_correction"] is True and content["rtn_error"] > 0
    assert all({"rtn_error", "reg_lambda", "correction_share"} <= site.keys() for site in content["sites"])
    page = reports.rebuild(folder).read_text()
    assert escape(verdict(content).sentence) in page and "sarqc-awq-gptq" in page
    assert inspect(folder)["bits_per_weight"] == pytest.approx(content["size"]["bits_per_weight"], abs=0.001)


@pytest.mark.parametrize("packed", [True, False])
def test_its_weights_give_the_same_logits(folder, packed):
    model, _ = sarqc.load(folder, packed=packed, dtype="bfloat16")
    logits = model(torch.arange(24)[None]).logits[0, -1]
    assert torch.allclose(logits[:6].float(), torch.tensor(LOGITS), atol=2e-3) and int(logits.argmax()) == 23


def test_it_is_copied_bit_for_bit_with_a_report_of_today(folder, tmp_path):
    out = sarqc.convert(folder, tmp_path / "out", format="compressed-tensors").out
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert json.loads((out / "report.json").read_text())["method"]["method"] == "sarqc-awq-gptq"

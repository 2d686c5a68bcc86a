"""The sweep in a small form: one row of each kind, which has to end as the committed results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.models import page, run

RESULTS = json.loads((Path(__file__).parents[2] / "benchmarks/results/models.json").read_text())
ROWS = ("qwen3_moe", "gemma3+vl", "gpt_oss@mxfp4", "qwen3@fp8", "deepseek_v32", "dbrx", "gpt_oss", "llama@bin")


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_a_row_ends_as_the_results_say(row, tmp_path):
    actual = run.one(row, tmp_path, "rtn")
    wanted = RESULTS["rows"][row]
    reasons = [actual.get("reference"), *(actual.get(key, {}).get("error") for key in ("transformers", "sarqc"))]
    assert actual["kind"] == wanted["kind"], f"{reasons} {actual}"
    assert actual.get("share") == wanted.get("share")
    assert actual["dry_run"] == wanted["dry_run"]


def _parallel() -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    result = float(torch.ones(1 << 17).exp().mean())
    torch.set_num_threads(before)
    return result


def test_a_stage_runs_whatever_ran_here_before(monkeypatch):
    """A fork of a process with an OpenMP pool would never end; a fresh one does."""
    monkeypatch.setattr(run, "TIMEOUT", 60)
    assert run.staged(_parallel)["value"] == pytest.approx(_parallel())
    assert run.staged(_parallel)["how"] == "ok"


def test_no_row_ends_in_a_traceback_or_wrong_numbers():
    kinds = {row: result["kind"] for row, result in RESULTS["rows"].items()}
    assert not [row for row, kind in kinds.items() if kind in ("traceback", "timeout", "no reference")]
    silent = [
        row
        for row, result in RESULTS["rows"].items()
        for key in ("transformers", "sarqc")
        if key in result and not result[key]["same"] and not result[key].get("error") and not result[key]["missing"]
    ]
    assert not silent


def test_dry_runs_say_what_runs_did():
    """But for what only a run says: wrong names where there is config.json alone, code that fails on text."""
    known = {"gemma3_text@vlprefix": ["config"], "gemma4_unified_assistant": ["headers", "config"]}
    rows = {row: result["dry_run"] for row, result in RESULTS["rows"].items() if "class" in result}
    assert len(rows) == 284
    apart = {row: [how for how, said in one.items() if said != "same"] for row, one in rows.items()}
    assert {row: hows for row, hows in apart.items() if hows} == known


def test_the_page_and_the_packaged_table_are_what_the_results_say():
    assert page.PAGE.read_text() == page.text(RESULTS)
    assert page.PACKAGED.read_text() == page.packaged(RESULTS)

"""Measured quality goes into the report, the page and the card, once for each text."""

from __future__ import annotations

from functools import partial

import pytest

import sarqc
from sarqc.entrypoints.evaluate import evaluate_and_save
from sarqc.errors import ArgumentError, ModelError
from sarqc.pipeline.blockwise_forward import BlockwiseForward
from sarqc.report import report
from tests.support import tiny


def test_before_and_after_are_saved_and_measured_again(tmp_path, monkeypatch):
    source = tiny.save("llama", tmp_path / "llama")
    out = sarqc.quantize(source, tmp_path / "out", bits=3, num_samples=2, seqlen=32).out
    how = dict(seqlen=48, max_windows=3)
    finished, steps = [], []
    finish_block = BlockwiseForward.finish_block
    monkeypatch.setattr(BlockwiseForward, "finish_block", lambda *at: (finish_block(*at), finished.append(at)))
    saved = evaluate_and_save(out, on_block=lambda *step: steps.append((len(finished), *step)), **how)
    assert steps == [(blocks, blocks, 4) for blocks in range(5)]
    for key, folder in (("before", source), ("after", out)):
        assert saved.entry[key] == pytest.approx(sarqc.evaluate(folder, packed=False, **how).perplexity, rel=1e-4)
    for dtype in ("auto", "bfloat16"):
        values = [sarqc.evaluate(folder, dtype=dtype, seqlen=32, max_windows=1).protocol for folder in (source, out)]
        assert {one["dtype"] for one in values} == {"float32" if dtype == "auto" else dtype}
        assert [one["packed"] for one in values] == [False, True]
    assert 0 < saved.entry["agreement"] < 1 and saved.entry["kl"] > 0 and saved.card
    assert report.load(out)["quality"] == [saved.entry]
    assert sarqc.evaluate(source, max_windows=1).protocol["seqlen"] == 256  # all positions of the model
    evaluate_and_save(out, **how)
    evaluate_and_save(out, seqlen=32, max_windows=2)
    assert [entry["seqlen"] for entry in report.load(out)["quality"]] == [48, 32]
    assert f"| builtin | 3 of 48 | {saved.entry['before']:.3f} |" in (out / "README.md").read_text()
    assert "Quality, measured" in (out / "report.html").read_text()
    assert sarqc.load(out)  # the checkpoint is as it was
    source.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="llama"):
        evaluate_and_save(out, **how)
    assert evaluate_and_save(out, original=tmp_path / "moved", **how).entry == saved.entry
    with pytest.raises(ArgumentError, match="is quantized itself: give the model before that"):
        evaluate_and_save(out, original=out, **how)
    assert report.load(out)["quality"][-1] == saved.entry
    for measure in (partial(evaluate_and_save, original=tmp_path / "moved"), sarqc.evaluate):
        with pytest.raises(ArgumentError, match=r"seqlen = 4096 is more than the \d+ positions of .*: use \d+ or less"):
            measure(out, seqlen=4096)

"""A run as whoever watches it sees it, and what it refuses before it begins."""

from __future__ import annotations

import json

import pytest
import torch

import sarqc
from sarqc import system
from sarqc.entrypoints.convert import convert
from sarqc.errors import ArgumentError, CheckpointError, ResourceError, SarqcError, TextError
from sarqc.pipeline.progress import NoProgress
from sarqc.pipeline.streams import Streams
from tests.e2e.test_golden import digest
from tests.support import tiny
from tests.support.stopping import Stopping

SMALL = {"num_samples": 2, "seqlen": 32}


class Diary(NoProgress):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append("note")

    def begin_blocks(self, blocks, done):
        self.lines.append(f"begin {blocks} done {done}")

    def stage(self, block, name):
        self.lines.append(f"{block} {name.partition(' ')[0]}")

    def block(self, result):
        self.lines.append(f"done {result.index}")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "llama")


def test_a_watcher_sees_every_stage_of_every_block(source, tmp_path):
    diary = Diary()
    sarqc.quantize(source, tmp_path / "out", progress=diary, **SMALL)
    # the reference on its way, four sites in turn, and what is left of the block
    block = ["load", "reference", *["forward", "solve"] * 4, "forward"]
    first, second = ([f"{index} {stage}" for stage in block] for index in range(2))
    assert diary.lines == ["note", "note", "begin 2 done 0", *first, "done 0", *second, "done 1", "note"]


def test_without_errors_to_correct_there_is_no_reference(source, tmp_path):
    diary = Diary()
    sarqc.quantize(source, tmp_path / "out", progress=diary, error_correction=False, **SMALL)
    assert not any("reference" in line for line in diary.lines) and "1 forward" in diary.lines


def test_effort_stands_for_single_options(source, tmp_path):
    """Fast is one forward pass with lambda by the prior. The report says so; the weights are those of the options."""
    fast = sarqc.quantize(source, tmp_path / "fast", effort="fast", **SMALL)
    given = {"reg_lambda": "prior", "cd_passes": 0, "error_correction": False}
    other = sarqc.quantize(source, tmp_path / "other", **given, **SMALL)
    assert fast.report["effort"] == "fast" and "effort" not in other.report
    assert fast.report["method"] == other.report["method"] and "reference" not in fast.report["seconds"]
    assert all("prior" in site["held_out"]["why"] for site in fast.report["sites"])
    for one in fast.out.glob("*.safetensors"):
        assert one.read_bytes() == (other.out / one.name).read_bytes()


def test_memory_that_a_library_lacks_before_the_first_block_is_one_line(source, tmp_path, monkeypatch):
    """torch has no error of its own for it."""

    def full(*args, **options):
        raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")

    monkeypatch.setattr(Streams, "begin", full)
    with pytest.raises(ResourceError, match=r"CUBLAS_STATUS_ALLOC_FAILED.*use a larger one or --device cpu"):
        sarqc.quantize(source, tmp_path / "out", num_samples=2, seqlen=32)


def test_a_tilde_is_the_home_folder(source, tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    sarqc.estimate(source, "~/run", work_dir="~/work", **SMALL)
    run = sarqc.quantize(source, "~/run", work_dir="~/work", method="rtn", group_size=32)
    converted = convert("~/run", "~/converted", format="gptq")
    compared = sarqc.compare(source, "~/compared", methods=["rtn"], bits=[4], seqlen=32, eval_seqlen=32, eval_windows=1)
    assert {run.out, converted.out, compared.out} <= set(home.iterdir())
    assert list(elsewhere.iterdir()) == []


def test_rounding_reads_no_text(source, tmp_path):
    diary = Diary()
    report = sarqc.quantize(source, tmp_path / "out", method="rtn", dataset="nowhere.txt", progress=diary).report
    assert report["calibration"] is None
    assert not any("forward" in line for line in diary.lines)


def test_the_report_is_complete_json(source, tmp_path):
    report = sarqc.quantize(source, tmp_path / "out", bits=3, group_size=32, **SMALL).report
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["targets"]["quantized"] == 14 and "lm_head" in report["targets"]["untouched"]
    # 3 bits, and a bf16 scale for every 32 weights; a Linear's shape takes 16 bytes.
    assert 3.5 <= report["size"]["bits_per_weight"] < 3.6
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert report["size"]["bytes"] == pytest.approx(stored, rel=0.1)
    assert {"load", "reference", "forward", "solve", "write", "total"} == set(report["seconds"])
    assert {"sarqc", "torch", "transformers", "python"} <= set(report["versions"])


def test_the_card_repeats_the_dtype_and_the_trust_that_were_asked_for(source, tmp_path):
    asked = dict(dtype="bfloat16", trust_remote_code=True)
    sarqc.quantize(source, tmp_path / "out", method="rtn", group_size=32, **asked)
    assert " --dtype bfloat16 --trust-remote-code" in (tmp_path / "out" / "README.md").read_text()


def test_a_resumed_run_keeps_the_dtype_that_was_measured_when_it_began(source, tmp_path, monkeypatch):
    asked = SMALL | dict(bits=3, group_size=32)
    monkeypatch.setattr(system, "multiplies_bf16", lambda: True)
    with pytest.raises(SarqcError):
        sarqc.quantize(source, tmp_path / "out", progress=Stopping(1), **asked)
    monkeypatch.setattr(system, "multiplies_bf16", lambda: False)
    resumed = sarqc.quantize(source, tmp_path / "out", **asked)
    straight = sarqc.quantize(source, tmp_path / "straight", dtype="bfloat16", **asked)
    assert resumed.report["dtype"] == "bfloat16"
    assert " --dtype bfloat16" in (tmp_path / "out" / "README.md").read_text()
    assert digest(tmp_path / "out") == digest(straight.out)
    other = sarqc.quantize(source, tmp_path / "other", **asked)
    assert digest(other.out) != digest(straight.out)


def test_own_tokens_are_calibrated_on_as_they_are(source, tmp_path):
    tokens = torch.arange(3 * 40).view(3, 40) % tiny.VOCABULARY
    report = sarqc.quantize(source, tmp_path / "out", dataset=tokens).report
    assert report["dtype"] == "float32" and "trust_remote_code" not in report
    assert report["calibration"]["windows"] == 3 and report["calibration"]["seqlen"] == 40
    assert all(site["rows"] == [120] for site in report["sites"])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"format": "ggml"}, ArgumentError, "format = 'ggml'"),
        ({"method": "magic"}, ArgumentError, "magic"),
        ({"bits": True}, ArgumentError, "bits = True"),
        ({"dataset": torch.zeros(3)}, ArgumentError, "int64"),
        ({"dataset": "nowhere.txt"}, TextError, "nowhere"),
        ({"num_samples": 0}, ArgumentError, "num_samples = 0"),
        ({"seqlen": 3}, ArgumentError, "seqlen = 3"),
        ({"device": "tpu"}, ArgumentError, "tpu"),
        ({"dtype": "int3"}, ArgumentError, "int3"),
    ],
)
def test_refusals_come_before_anything_is_written(source, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        sarqc.quantize(source, tmp_path / "out", **{"num_samples": 2, "seqlen": 32} | settings)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_kept_unless_asked(source, tmp_path):
    out = tmp_path / "out"
    sarqc.quantize(source, out, method="rtn")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="overwrite"):
        sarqc.quantize(source, out, method="rtn", bits=3)
    with pytest.raises(SarqcError):
        sarqc.quantize(source, out, overwrite=True, dataset="nowhere.txt")
    assert (out / "model.safetensors").read_bytes() == before
    sarqc.quantize(source, out, method="rtn", bits=3, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before

"""The work folder: what goes on, what is refused, and what may be damaged without being believed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import sarqc
from sarqc import system
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.checkpoint.state import read_sealed, write_sealed
from sarqc.errors import ArgumentError, CheckpointError, Interrupted, ResourceError
from sarqc.pipeline import resume
from sarqc.pipeline.resume import begin, default_work
from tests.support import kept, tiny
from tests.support.stopping import Stopping

SMALL = {"num_samples": 2, "seqlen": 32, "group_size": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save("qwen3_moe", tmp_path_factory.mktemp("models") / "model", num_hidden_layers=3)


@pytest.fixture(scope="module")
def straight(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "out"
    return kept.quantize(source, out, **SMALL)


@pytest.fixture(scope="module")
def stopped_once(source, tmp_path_factory):
    """A run stopped after two of its three blocks; its folder, which holds nothing but the work folder."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Interrupted, match="stopped after block 2 of 3"):
        sarqc.quantize(source, folder / "out", progress=Stopping(2), **SMALL)
    assert [path.name for path in folder.iterdir()] == [".out.work"]
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """The output folder of a copy of that run."""
    shutil.copytree(stopped_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def weights(out):
    return (out / "model.safetensors").read_bytes()


def go_on(source, out, straight, **changes):
    """Finish a run; the bytes must be those of the straight one."""
    progress = Stopping()
    sarqc.quantize(source, out, progress=progress, **SMALL | changes)
    assert weights(out) == weights(straight.out)
    assert not default_work(out).exists()
    return progress


def test_a_stopped_run_goes_on_where_it_was(source, stopped, straight):
    progress = go_on(source, stopped, straight)
    assert progress.done == 2 and progress.solved == [2]
    assert any("resuming at block 3 of 3" in note for note in progress.notes)
    report = json.loads((stopped / "report.json").read_text())
    for key in ("model", "quant", "method", "calibration", "targets", "size", "error", "rtn_error", "notes"):
        assert report[key] == straight.report[key]
    timeless = [[site | {"seconds": 0} for site in one["sites"]] for one in (report, straight.report)]
    assert timeless[0] == json.loads(json.dumps(timeless[1]))


def test_plain_rounding_goes_on_too(source, tmp_path):
    out = tmp_path / "out"
    sarqc.quantize(source, tmp_path / "straight", method="rtn")
    with pytest.raises(Interrupted):
        sarqc.quantize(source, out, method="rtn", progress=Stopping(1))
    assert not (default_work(out) / "hidden.safetensors").exists()
    sarqc.quantize(source, out, method="rtn")
    assert weights(out) == weights(tmp_path / "straight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits = 4, now it is 3"),
        ({"reg_lambda": 0.5}, "reg_lambda = 'auto', now it is 0.5"),
        ({"method": "gptq"}, "method = 'sarqc-gptq', now it is 'gptq'"),
        ({"num_samples": 3}, "calibration"),
        ({"dtype": "bfloat16"}, "dtype = 'float32', now it is 'bfloat16'"),
        ({"ignore": ["o_proj"]}, "ignore"),
    ],
)
@pytest.mark.fault("a run that goes on with another setting")
def test_a_changed_setting_is_refused_with_both_values(source, stopped, outcomes, change, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        sarqc.quantize(source, stopped, **SMALL | change)
    assert "--no-resume" in str(caught.value) and "micro_batch" in str(caught.value)
    outcomes.clear_error(caught.value)
    assert not stopped.exists()


def test_versions_and_the_model_count_as_settings(source, stopped, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(source, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(ArgumentError, match=r"model\.config"):
        sarqc.quantize(other, stopped, **SMALL)
    versions = system.versions()
    monkeypatch.setattr("sarqc.pipeline.fingerprint.versions", lambda: versions | {"torch": "1.0"})
    with pytest.raises(ArgumentError, match=r"versions\.torch = .*now it is '1\.0'"):
        sarqc.quantize(source, stopped, **SMALL)


def test_what_may_change_may(source, stopped, straight):
    progress = go_on(source, stopped, straight, gram_budget=4 * 64 * 64)
    assert progress.solved == [2]


def test_restart_begins_again(source, stopped, straight, tmp_path):
    sarqc.quantize(source, stopped, resume=False, **SMALL | {"bits": 3})
    assert weights(stopped) != weights(straight.out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def damage(path, at=-5):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("hurt", [damage, truncate, lambda path: path.unlink(), lambda path: damage(path, 60)])
@pytest.mark.parametrize(
    ("name", "done"), [("blocks/00001.safetensors", 1), ("blocks/00001.json", 1), ("hidden.safetensors", 2)]
)
@pytest.mark.fault("a damaged or lost file of the work folder")
def test_what_is_damaged_is_made_again(source, stopped, straight, outcomes, hurt, name, done):
    """Hidden states are made again from the sound blocks before them, to the same bit."""
    hurt(default_work(stopped) / name)
    progress = go_on(source, stopped, straight)
    outcomes.recovered(weights(stopped), weights(straight.out))
    assert progress.done == done and progress.solved == list(range(done, 3))
    assert any(Path(name).name in note for note in progress.notes) or "unlink" in hurt.__code__.co_names


def test_channel_scales_outlive_a_stop_and_lost_hidden_states(tmp_path):
    """What they changed beside the weights (norms) is saved with the block, and runs forward with it."""
    source, out = tiny.save("llama", tmp_path / "model", num_hidden_layers=3), tmp_path / "out"
    run = dict(method="sarqc-awq-gptq", **SMALL)
    expected = weights(sarqc.quantize(source, tmp_path / "straight", **run).out)
    with pytest.raises(Interrupted):
        sarqc.quantize(source, out, progress=Stopping(2), **run)
    changed = kept.opened(out).record(0).changed
    assert changed and all(name.endswith("norm.weight") for name in changed)
    (default_work(out) / "hidden.safetensors").unlink()
    assert weights(sarqc.quantize(source, out, **run).out) == expected


def test_hidden_states_of_the_block_before_redo_one_block(source, stopped, straight, tmp_path):
    """What a kill leaves between the two files of a block."""
    older = tmp_path / "older"
    with pytest.raises(Interrupted):
        sarqc.quantize(source, older, progress=Stopping(1), **SMALL)
    shutil.copy(default_work(older) / "hidden.safetensors", default_work(stopped) / "hidden.safetensors")
    progress = go_on(source, stopped, straight)
    assert progress.done == 1 and progress.solved == [1, 2]


def test_hidden_states_that_take_long_are_stored_less_often(source, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "STATES_SHORT", 0.0)
    monkeypatch.setattr(resume, "STATES_SHARE", 0.0)  # after the first block there is no time for them
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        sarqc.quantize(source, out, progress=Stopping(2), **SMALL)
    progress = go_on(source, out, straight)
    assert progress.done == 1 and progress.solved == [1, 2]


@pytest.mark.fault("a damaged plan of the work folder")
def test_a_damaged_plan_is_refused_with_the_way_out(source, stopped, outcomes):
    plan = default_work(stopped) / "plan.json"
    text = plan.read_text()
    for broken in (text.replace('"bits": 4', '"bits": 3'), text[:-9], ""):
        plan.write_text(broken)
        with pytest.raises(CheckpointError, match=r"plan\.json.*--no-resume") as caught:
            sarqc.quantize(source, stopped, **SMALL)
        outcomes.clear_error(caught.value)
    sarqc.quantize(source, stopped, resume=False, **SMALL)


@pytest.mark.fault("two runs at once in one work folder")
def test_two_processes_never_share_a_work_folder(tmp_path, outcomes):
    folder = tmp_path / "work"
    refusal = pytest.raises(ResourceError, match=rf"in use by process {os.getpid()}")
    with begin(folder, {"a": 1}, {"blocks": 2}), refusal as caught, begin(folder, {"a": 1}, {"blocks": 2}):
        pass
    outcomes.clear_error(caught.value)


@pytest.mark.fault("a work folder with somebody's files in it")
def test_a_folder_with_other_files_is_left_alone(source, tmp_path, outcomes):
    mine = tmp_path / "mine"
    (mine / "blocks").mkdir(parents=True)
    (mine / "blocks" / "diary.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="other files") as caught:
        sarqc.quantize(source, tmp_path / "out", work_dir=mine, **SMALL)
    outcomes.clear_error(caught.value)
    assert (mine / "blocks" / "diary.txt").read_text() == "dear"


@pytest.mark.parametrize("place", ["out", "out/inside", "."])
def test_work_and_output_lie_apart(source, tmp_path, place):
    with pytest.raises(ArgumentError, match="inside each other"):
        sarqc.quantize(source, tmp_path / "out", work_dir=tmp_path / place, **SMALL)


def test_a_work_folder_is_safetensors_and_json(stopped):
    work = default_work(stopped)
    files = sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file())
    blocks = [f"blocks/{index:05d}.{end}" for index in range(2) for end in ("json", "safetensors")]
    assert files == [*blocks, "hidden.safetensors", "lock", "plan.json"]


def test_weights_come_back_as_the_checkpoint_has_them(straight):
    work, names = kept.opened(straight.out), []
    with open_checkpoint(straight.out) as checkpoint:
        for index in range(3):
            for linear, weight in work.stored(index)[0].items():
                stored = checkpoint.quantized(linear)
                assert torch.equal(weight.codes, stored.codes) and torch.equal(weight.scales, stored.scales)
                assert torch.equal(weight.zeros, stored.zeros)
                names.append(linear)
    assert len(names) == straight.report["targets"]["quantized"]


@pytest.mark.fault("a work folder of an earlier version")
def test_a_work_folder_of_an_earlier_version_is_refused_with_the_way_out(source, stopped, straight, outcomes):
    """Which named no layout, and had a file of another name."""
    work = default_work(stopped)
    plan = read_sealed(work / "plan.json")
    del plan["layout"]
    write_sealed(work / "plan.json", plan)
    (work / "widths.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"another version of sarqc.*--no-resume begins again") as caught:
        sarqc.quantize(source, stopped, **SMALL)
    outcomes.clear_error(caught.value)
    assert (work / "blocks" / "00001.safetensors").exists()
    progress = go_on(source, stopped, straight, resume=False)
    assert progress.solved == [0, 1, 2]


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("include", [(), ("lm_head",)], ids=["blocks", "and the head"])
def test_lost_hidden_states_of_a_corrected_stream_come_back_to_the_bit(tmp_path, kind, include):
    """A correction is added to what has left a layer. In bf16 that is not what the layer's new weight puts out."""
    source, out = tiny.save(kind, tmp_path / "model", num_hidden_layers=3), tmp_path / "out"
    run = SMALL | {"dtype": "bfloat16", "error_correction": True, "num_samples": 4, "include": include}
    expected = sarqc.quantize(source, tmp_path / "straight", **run)
    assert any(site["correction_share"] for site in expected.report["sites"])
    with pytest.raises(Interrupted):
        sarqc.quantize(source, out, progress=Stopping(3 if include else 2), **run)
    (default_work(out) / "hidden.safetensors").unlink()
    progress = Stopping()
    assert weights(sarqc.quantize(source, out, progress=progress, **run).out) == weights(expected.out)
    assert progress.done == (3 if include else 2)


def test_a_file_system_without_locks_is_said_as_it_is(tmp_path, monkeypatch):
    """As NFS without its lock service, or Lustre without `-o flock`."""

    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    refusal = pytest.raises(ResourceError, match=r"cannot be locked \(No locks available\): .*--work-dir")
    with refusal as caught, begin(tmp_path / "work", {"a": 1}, {"blocks": 2}):
        pass
    assert "in use" not in str(caught.value)


def test_the_lock_of_a_work_folder_is_the_last_to_go(tmp_path, monkeypatch):
    """A kill before that leaves a folder that the next run takes. `checkpoint/` stays where another format is made."""
    folder, rmtree, seen = tmp_path / "work", shutil.rmtree, []

    def spy(path, *rest, **options):
        seen.append((Path(path), sorted(one.name for one in folder.iterdir())))
        rmtree(path, *rest, **options)

    with begin(folder, {"a": 1}, {"blocks": 2}) as work:
        work.built.mkdir()
        (work.built / "model.safetensors").touch()
        monkeypatch.setattr(shutil, "rmtree", spy)
        work.remove()
    assert seen[-1] == (folder, ["lock"]) and not folder.exists()

"""A finished block is a shard of the checkpoint: written once, renamed at the end, and never lost on the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

import sarqc
from sarqc.checkpoint import assemble
from sarqc.checkpoint.convert import Conversion
from sarqc.checkpoint.headers import bytes_of
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.entrypoints import quantize as job
from sarqc.entrypoints.verify import verify
from sarqc.errors import CheckpointError
from sarqc.pipeline.resume import default_work
from tests.support import tiny
from tests.support.killing import contents, count_operations, in_child
from tests.support.stopping import Stopping

SMALL = {"num_samples": 2, "seqlen": 32, "group_size": 32, "method": "gptq"}
BLOCKS = 3
NAMES = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save("qwen3_moe", tmp_path_factory.mktemp("models") / "model", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def merged(source, tmp_path_factory):
    """One file, as a small model is."""
    return sarqc.quantize(source, tmp_path_factory.mktemp("merged") / "out", **SMALL).out


@pytest.fixture
def several(monkeypatch):
    """A checkpoint counts as too large for one file."""
    monkeypatch.setattr(assemble, "MERGE_BYTES", 0)


@pytest.fixture(scope="module")
def sharded(source, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(assemble, "MERGE_BYTES", 0)
        return contents(sarqc.quantize(source, tmp_path_factory.mktemp("sharded") / "out", **SMALL).out)


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """The folder of a run that ended when its last block was finished."""
    folder = tmp_path_factory.mktemp("finished")

    def end(*args, **options):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(job, "write_checkpoint", end)
        sarqc.quantize(source, folder / "out", **SMALL)
    return folder


class Inodes(Stopping):
    """Which file each finished block is."""

    def __init__(self, work):
        super().__init__()
        self.work, self.inodes = work, []

    def block(self, result):
        super().block(result)
        self.inodes.append((self.work / "blocks" / f"{result.index:05d}.safetensors").stat().st_ino)


def tensors(folder):
    with open_checkpoint(folder) as checkpoint:
        return {name: bytes(bytes_of(checkpoint.raw_load(name))) for name in checkpoint.raw_names()}


def test_the_shards_of_the_output_are_the_files_of_the_blocks(source, merged, several, tmp_path):
    out = tmp_path / "out"
    inodes = Inodes(default_work(out))
    sarqc.quantize(source, out, progress=inodes, **SMALL)
    assert sorted(path.name for path in out.glob("*.safetensors")) == NAMES
    assert [(out / name).stat().st_ino for name in NAMES[:BLOCKS]] == inodes.inodes
    index = json.loads((out / "model.safetensors.index.json").read_text())
    home = index["weight_map"]
    assert all(home[name] == NAMES[int(name.split(".")[2])] for name in home if ".layers." in name)
    assert {name for name, shard in home.items() if shard == NAMES[-1]} == {
        "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight",
    }  # fmt: skip
    assert tensors(out) == tensors(merged)
    assert verify(out, against=source).sound and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_tensors_fill_shards_of_their_own(source, merged, several, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "SHARD_BYTES", 20_000)
    out = sarqc.quantize(source, tmp_path / "out", **SMALL).out
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(names) > 4 and names == [assemble.shard_name(number + 1, len(names)) for number in range(len(names))]
    assert tensors(out) == tensors(merged) and verify(out).sound


def written(action, place):
    """Bytes that a child process writes while it does something."""

    def counter():
        return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])

    def count():
        before = counter()
        action()
        place.write_text(str(counter() - before))

    assert in_child(count) == 0
    return int(place.read_text())


@pytest.mark.parametrize(("limit", "times"), [(0, 1), (assemble.MERGE_BYTES, 2)], ids=["shards", "one file"])
def test_a_run_writes_every_weight_once(tmp_path, monkeypatch, limit, times):
    """Once more where a small model becomes one file. Beside the weights there are hidden states, records, reports."""
    source = tiny.save("llama", tmp_path / "model", hidden_size=512, intermediate_size=1536, num_hidden_layers=4)
    monkeypatch.setattr(assemble, "MERGE_BYTES", limit)
    monkeypatch.setattr(shutil, "copyfile", _copy)  # the other one writes inside the kernel, where nobody counts
    out = tmp_path / "out"
    result = written(lambda: sarqc.quantize(source, out, **SMALL), tmp_path / "written")
    weights = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    hidden = 3 * SMALL["num_samples"] * SMALL["seqlen"] * 512 * 4
    assert weights > 5_000_000
    assert weights <= result <= (times + 0.15) * weights + hidden


def _copy(source, target):
    Path(target).write_bytes(Path(source).read_bytes())


@pytest.mark.fault("SIGKILL while finished shards become the output")
@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_a_kill_while_shards_are_moved_loses_no_block(source, finished, sharded, several, tmp_path, outcomes, format):
    """Before any file operation between the last block and the end: nothing is solved again."""
    run = dict(model=source, out=tmp_path / "out", format=format, **SMALL)

    def again():
        shutil.copytree(finished, tmp_path, dirs_exist_ok=True)

    again()
    operations = count_operations(lambda: sarqc.quantize(**run))
    expected = contents(tmp_path / "out")
    assert format == "gptq" or expected == sharded
    for kill_at in range(operations // 6, operations, operations // 6):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        again()
        assert in_child(lambda: sarqc.quantize(**run), kill_at=kill_at) == -9
        if (tmp_path / "out").exists():
            continue
        progress = Stopping()
        sarqc.quantize(**run, progress=progress)
        assert progress.done == BLOCKS and progress.solved == []
        outcomes.recovered(contents(tmp_path / "out"), expected)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_file_system_gets_copies(source, sharded, several, tmp_path, monkeypatch):
    """The work folder keeps its shards until the output is whole."""
    work, out, rename = tmp_path / "far" / "work", tmp_path / "near" / "out", os.rename
    inside = lambda path: Path(path).is_relative_to(work.parent)  # noqa: E731

    def refused(old, new):
        if inside(old) != inside(new):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(old, new)

    copied = []
    copyfile = shutil.copyfile
    monkeypatch.setattr(os, "rename", refused)
    monkeypatch.setattr(shutil, "copyfile", lambda old, new: (copied.append(Path(new).name), copyfile(old, new))[1])
    sarqc.quantize(source, out, work_dir=work, **SMALL)
    assert contents(out) == sharded and not work.exists()
    assert [name for name in copied if name.endswith(".safetensors")] == NAMES[:BLOCKS]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_real_other_file_system(source, sharded, several, tmp_path):
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system here")
    work = memory / f"sarqc-test-{os.getpid()}"
    try:
        sarqc.quantize(source, tmp_path / "out", work_dir=work, **SMALL)
        assert contents(tmp_path / "out") == sharded and not work.exists()
    finally:
        shutil.rmtree(work, ignore_errors=True)


class Rot(Stopping):
    """A disk that flips a bit of the second block when it has been saved."""

    def __init__(self, out):
        super().__init__()
        self.shard = default_work(out) / "blocks" / "00001.safetensors"

    def block(self, result):
        super().block(result)
        if result.index == 1:
            data = bytearray(self.shard.read_bytes())
            data[-99] ^= 8
            self.shard.write_bytes(data)


@pytest.mark.fault("a disk that flips a bit of a finished block")
@pytest.mark.parametrize("limit", [0, assemble.MERGE_BYTES], ids=["shards", "one file"])
def test_a_bad_disk_is_found_and_the_block_made_again(source, merged, sharded, tmp_path, monkeypatch, outcomes, limit):
    monkeypatch.setattr(assemble, "MERGE_BYTES", limit)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.") as caught:
        sarqc.quantize(source, out, progress=Rot(out), **SMALL)
    outcomes.clear_error(caught.value)
    assert not out.exists()
    progress = Stopping()
    sarqc.quantize(source, out, progress=progress, **SMALL)
    assert progress.done == 1 and progress.solved == [1, 2]
    outcomes.recovered(contents(out), contents(merged) if limit else sharded)


def test_a_conversion_that_fails_keeps_the_blocks(source, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    run = dict(model=source, out=tmp_path / "out", format="gptq", **SMALL)

    def fail(*args, **options):
        raise CheckpointError("no good")

    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="no good"):
        patched.setattr(Conversion, "write", fail)
        sarqc.quantize(**run)
    assert [path.name for path in tmp_path.iterdir()] == [".out.work"]
    progress = Stopping()
    sarqc.quantize(**run, progress=progress)
    assert progress.solved == [] and verify(run["out"], against=source).sound

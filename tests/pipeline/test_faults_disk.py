"""A disk that is full, too small, or limited: a clear error, nothing half written, and the same command resumes."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

import sarqc
from sarqc.checkpoint import assemble
from sarqc.errors import CheckpointError, ResourceError, SarqcError
from sarqc.pipeline.resume import default_work
from tests.support.fault_case import SMALL, recovered, weights
from tests.support.killing import in_child


def full_disk(case, name):
    """The disk is full when a file whose path ends so is forced to it."""
    fsync, struck = os.fsync, []

    def full(opened):
        path = str(Path(f"/proc/self/fd/{opened}").readlink())
        if path.removesuffix(".partial").endswith(name):
            struck.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(opened)

    case.patch.setattr("os.fsync", full)
    with pytest.raises((ResourceError, CheckpointError), match="No space left on device"):
        sarqc.quantize(case.source, case.out, **SMALL)
    assert len(struck) == 1 and not case.out.exists()
    assert not list(case.out.parent.rglob("*.partial"))
    recovered(case)


@pytest.mark.fault("a full disk while the plan is written")
def test_disk_full_at_the_plan(case):
    full_disk(case, "plan.json")


@pytest.mark.fault("a full disk while a block is saved")
@pytest.mark.parametrize("name", ["blocks/00001.safetensors", "blocks/00001.json"])
def test_disk_full_at_a_block(case, name):
    full_disk(case, name)


@pytest.mark.fault("a full disk while hidden states are saved")
def test_disk_full_at_hidden_states(case):
    full_disk(case, "hidden.safetensors")


@pytest.mark.fault("a full disk while the checkpoint is written")
@pytest.mark.parametrize("name", ["checkpoint/model.safetensors", "checkpoint/config.json", "checkpoint"])
def test_disk_full_at_the_output(case, name):
    full_disk(case, name)


@pytest.mark.fault("a full disk while the checkpoint is written")
@pytest.mark.parametrize("name", ["checkpoint/model-00004-of-00004.safetensors", "checkpoint/report.json"])
def test_disk_full_at_an_output_of_several_files(case, name):
    """Shards that were renamed before are moved back, not lost."""
    case.patch.setattr(assemble, "MERGE_BYTES", 0)
    full_disk(case, name)


@pytest.mark.fault("a disk too small from the start")
def test_disk_too_small_from_the_start(case):
    usage = shutil.disk_usage(case.out.parent)
    case.patch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"of disk, 1\.0 kB are free"):
        sarqc.quantize(case.source, case.out, **SMALL)
    assert list(case.out.parent.iterdir()) == []
    recovered(case)


@pytest.mark.fault("a file size limit of the operating system")
def test_file_size_limit(case):
    """The operating system itself refuses to let a file grow."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        with pytest.raises(ResourceError, match="cannot be written"):
            sarqc.quantize(case.source, case.out, **SMALL)

    assert in_child(limited) == 0
    recovered(case)


@pytest.mark.fault("a tmpfs of 16 MB that fills up")
def test_small_tmpfs(case):
    """A file system of 16 MB that fills up while the run writes; needs the right to mount one."""
    disk = case.out.parent / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        usage = shutil.disk_usage(case.source)
        case.patch.setattr("shutil.disk_usage", lambda path: usage)  # or it would be refused before it begins
        (disk / "ballast").write_bytes(bytes((16 << 20) - 250_000))
        with pytest.raises(SarqcError, match="No space left on device"):
            sarqc.quantize(case.source, disk / "out", **SMALL)
        assert not (disk / "out").exists() and default_work(disk / "out").exists()
        (disk / "ballast").unlink()
        sarqc.quantize(case.source, disk / "out", **SMALL)
        case.outcomes.recovered(weights(disk / "out"), case.expected)
    finally:
        subprocess.run(["umount", disk], check=True)

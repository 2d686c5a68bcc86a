"""Tensors in a file: what memory, the folder and the disk see of them."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from sarqc.pipeline.offload import Scratch

from sarqc.errors import ResourceError
from tests.support.killing import in_child


def mapped(tensor) -> int | None:
    """Bytes of its file that are in this process's memory; None where it is in no file."""
    at, found = tensor.data_ptr(), None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        span = line.split()[0]
        if "-" in span:
            first, last = (int(end, 16) for end in span.split("-"))
            found = first <= at < last and "(deleted)" in line
        elif found and span == "Rss:":
            return int(line.split()[1]) * 1024
    return None


def made(room, shape=(3, 1000), dtype=torch.float32):
    return room.empty(shape, dtype, pinned=False)


def test_what_fits_the_budget_is_in_memory_and_the_rest_is_not(tmp_path):
    room = Scratch(tmp_path, budget=12_000)
    for in_file in (False, True):
        tensor = made(room)
        tensor.fill_(1.5)
        assert tensor.shape == (3, 1000) and tensor.dtype == torch.float32 and bool((tensor == 1.5).all())
        assert (mapped(tensor) is not None) == in_file
    assert mapped(made(room, (0, 5))) is None


def test_a_file_has_no_name(tmp_path):
    tensor = made(Scratch(tmp_path, 0))
    tensor.fill_(1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_goes_with_its_tensor_and_not_before(tmp_path):
    """Its room on the disk is free again while the run goes on."""
    files = lambda: Path("/proc/self/maps").read_text().count(str(tmp_path))  # noqa: E731
    room = Scratch(tmp_path, 0)
    kept, other = made(room), made(room)
    part = other[1:].fill_(2.0)
    del other
    room.leave(part)
    assert files() == 2 and bool((part == 2.0).all())
    del part
    assert files() == 1
    room.leave(kept)


def test_parts_that_are_left_take_no_memory_and_keep_their_values(tmp_path):
    """Windows begin and end inside pages: their neighbours' values are in the same ones."""
    room = Scratch(tmp_path, 0)
    windows = made(room, (50, 100_001), torch.int16)
    other = made(room, (7, 333), torch.int16)
    other.fill_(-1)
    for number, window in enumerate(windows):
        window.fill_(number)
        assert mapped(windows) >= window.nbytes
        room.leave(window)
        assert mapped(windows) < windows.nbytes // 4  # some systems touch more than a page at a time
    for number, window in enumerate(windows):
        assert bool((window == number).all())
        room.leave(windows[number : number + 1])
    assert bool((other == -1).all())


def test_memory_of_others_is_not_touched(tmp_path):
    room = Scratch(tmp_path, 4000)
    kept, foreign = made(room, (1000,)), torch.arange(100_000.0)
    kept.fill_(2)
    made(room)
    for tensor in (kept, foreign):
        room.leave(tensor)
    assert bool((kept == 2).all()) and torch.equal(foreign, torch.arange(100_000.0))


def test_a_tensor_outlives_the_room_that_made_it(tmp_path):
    tensor = made(Scratch(tmp_path, 0))
    tensor.fill_(3)
    shutil.rmtree(tmp_path)
    assert bool((tensor == 3).all())


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    made(Scratch(tmp_path / "no" / "such" / "folder", 0)).fill_(1)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        ResourceError, match=r"cannot hold 1\.2e-05 GB of hidden states \(No space.*--activation-budget"
    ):
        made(Scratch(tmp_path, 0))
    assert list(tmp_path.iterdir()) == []


def test_a_limit_of_the_system_is_an_error_too(tmp_path):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        with pytest.raises(ResourceError, match="File too large"):
            made(Scratch(tmp_path, 0))

    assert in_child(limited) == 0


def test_a_real_disk_that_is_full_is_no_bus_error(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        room = Scratch(tmp_path, 0)
        with pytest.raises(ResourceError, match="No space left on device"):
            made(room, (4 << 20,), torch.uint8)
        made(room, (1 << 19,), torch.uint8).fill_(1)
        del room  # and with it what is mapped
    finally:
        subprocess.run(["umount", tmp_path], check=True)

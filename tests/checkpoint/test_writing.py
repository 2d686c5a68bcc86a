"""ShardWriter: exact bytes, splits, names, and what is left behind when something fails."""

import hashlib
import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from sarqc.checkpoint.manifest import MANIFEST
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.checkpoint.writer import ShardWriter
from sarqc.errors import ArgumentError, CheckpointError


def everything(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_file_is_what_the_safetensors_library_writes(tmp_path, tensors):
    with ShardWriter(tmp_path) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    assert everything(tmp_path) == ["model.safetensors", MANIFEST]
    assert (tmp_path / "model.safetensors").read_bytes() == save(tensors, metadata={"format": "pt"})


def test_pass_through_is_bit_for_bit(tmp_path, make_folder, tensors, bitwise):
    source = open_checkpoint(make_folder({"model.safetensors": tensors}, name="source"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with ShardWriter(tmp_path / "out", shard_bytes=50) as writer:
        for name in source.raw_names():
            writer.add(name, source.raw_load(name))
    copy = open_checkpoint(tmp_path / "out")
    assert len(copy.files) > 3
    for name, tensor in tensors.items():
        assert bitwise(copy.raw_load(name), tensor), name


def test_shards_fill_up_to_their_size(tmp_path):
    sizes = {"a": 40, "b": 60, "c": 1, "huge": 500, "d": 100, "e": 1}
    with ShardWriter(tmp_path, shard_bytes=100) as writer:
        for name, size in sizes.items():
            writer.add(name, torch.full((size,), size % 256, dtype=torch.uint8))
        files = writer.close()
    names = [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert everything(tmp_path) == [*names, "model.safetensors.index.json", MANIFEST]
    assert [file.name for file in files] == [*names, "model.safetensors.index.json", MANIFEST]
    assert index["metadata"] == {"total_size": 702}
    home = {"a": 0, "b": 0, "c": 1, "huge": 2, "d": 3, "e": 4}
    assert index["weight_map"] == {name: names[number] for name, number in home.items()}
    for name, file in index["weight_map"].items():
        assert load_file(tmp_path / file)[name].tolist() == [sizes[name] % 256] * sizes[name]


def test_exactly_full_is_one_shard(tmp_path):
    with ShardWriter(tmp_path, shard_bytes=8) as writer:
        writer.add("a", torch.zeros(1))
        writer.add("b", torch.zeros(1))
    assert everything(tmp_path) == ["model.safetensors", MANIFEST]


def test_bytes_do_not_depend_on_the_order_inside_a_shard(tmp_path, tensors):
    for folder, names in (("x", list(tensors)), ("y", list(reversed(tensors)))):
        with ShardWriter(tmp_path / folder) as writer:
            for name in names:
                writer.add(name, tensors[name])
    assert (tmp_path / "x/model.safetensors").read_bytes() == (tmp_path / "y/model.safetensors").read_bytes()


def test_strided_views_gradients_and_shared_memory_are_written_as_values(tmp_path):
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    with ShardWriter(tmp_path) as writer:
        writer.add("t", base.T)
        writer.add("row", base[1])
        writer.add("one", base[2, 3])
        writer.add("wide", torch.tensor([1.0]).expand(5))
    read = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read["t"], base.detach().T)
    assert read["row"].tolist() == [4, 5, 6, 7] and read["one"].shape == () and read["one"] == 11
    assert read["wide"].tolist() == [1] * 5


def test_a_tensor_is_on_disk_when_add_returns(tmp_path):
    tensor = torch.zeros(1000)
    writer = ShardWriter(tmp_path)
    writer.add("a", tensor)
    tensor.fill_(9)
    writer.close()
    assert load_file(tmp_path / "model.safetensors")["a"].abs().sum() == 0


def test_no_final_name_before_the_end(tmp_path):
    writer = ShardWriter(tmp_path, shard_bytes=4)
    for name in "abc":
        writer.add(name, torch.zeros(1))
        assert all(path.startswith(".") for path in everything(tmp_path))
    writer.close()
    assert not any(path.startswith(".") for path in everything(tmp_path))


def test_refusals(tmp_path):
    with pytest.raises(ArgumentError, match="shard_bytes = 0"):
        ShardWriter(tmp_path, shard_bytes=0)
    writer = ShardWriter(tmp_path)
    with pytest.raises(CheckpointError, match="no tensor was written"):
        writer.close()
    writer.add("a", torch.zeros(1))
    for name, tensor, message in (
        ("a", torch.zeros(1), "'a' was written already"),
        ("__metadata__", torch.zeros(1), "names must differ"),
        ("m", torch.zeros(1, device="meta"), "meta"),
        ("s", torch.eye(2).to_sparse(), "sparse"),
        ("c", torch.zeros(1, dtype=torch.complex64), "complex64"),
    ):
        with pytest.raises(CheckpointError, match=message):
            writer.add(name, tensor)
    writer.close()
    assert list(load_file(tmp_path / "model.safetensors")) == ["a"]
    with pytest.raises(CheckpointError, match="came after the checkpoint was closed"):
        writer.add("b", torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"model.safetensors is there already"):
        ShardWriter(tmp_path)
    assert list(load_file(tmp_path / "model.safetensors")) == ["a"]


def test_an_error_in_the_block_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, shard_bytes=4) as writer:
        for name in "abc":
            writer.add(name, torch.zeros(1))
        raise KeyError
    assert everything(tmp_path) == []


@pytest.fixture
def small_disk():
    """Files cannot grow beyond 64 kB: the kernel itself refuses the write, as on a full disk."""
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, old)


@pytest.mark.fault("a full disk while the checkpoint is written")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, small_disk, outcomes):
    writer = ShardWriter(tmp_path, shard_bytes=30_000)
    writer.add("a", torch.zeros(5000))
    writer.add("b", torch.zeros(5000))
    with pytest.raises(CheckpointError, match=r"\.model\.spool cannot be written: File too large") as caught:
        writer.add("c", torch.zeros(50_000))
    outcomes.clear_error(caught.value)
    assert everything(tmp_path) == []
    with pytest.raises(CheckpointError, match="was aborted"):
        writer.add("d", torch.zeros(1))
    with pytest.raises(CheckpointError, match="was aborted"):
        writer.close()


@pytest.mark.fault("a full disk while the checkpoint is written")
def test_a_disk_that_fills_while_a_shard_is_finished(tmp_path, small_disk, outcomes):
    """The spool fits 64 kB, the shard (header and the same bytes) does not."""
    writer = ShardWriter(tmp_path)
    writer.add("a", torch.zeros(16384))
    with pytest.raises(CheckpointError, match=r"\.model-00001\.partial cannot be written: File too large") as caught:
        writer.close()
    outcomes.clear_error(caught.value)
    assert everything(tmp_path) == []


@pytest.mark.fault("a full disk while the checkpoint is written")
def test_a_disk_that_fills_at_the_index(tmp_path, small_disk, outcomes):
    writer = ShardWriter(tmp_path, shard_bytes=1)
    for number in range(3):
        writer.add(f"{number}." + "x" * 30_000, torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"index\.json cannot be written: File too large") as caught:
        writer.close()
    outcomes.clear_error(caught.value)
    assert everything(tmp_path) == []


@pytest.mark.fault("a full disk while the checkpoint is written")
def test_a_disk_that_fills_at_the_manifest(tmp_path, small_disk, outcomes):
    """Names of 250 letters, 200 of them: the index fits 64 kB, the manifest, which says more of each, does not."""
    writer = ShardWriter(tmp_path, shard_bytes=400)
    for number in range(200):
        writer.add(f"{number:03d}." + "x" * 246, torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"sarqc-manifest\.json cannot be written: File too large") as caught:
        writer.close()
    outcomes.clear_error(caught.value)
    assert everything(tmp_path) == []


def test_the_manifest_holds_the_sum_of_each_tensor_whatever_the_shards(tmp_path, tensors):
    for folder, size in (("one", 10_000), ("many", 50)):
        with ShardWriter(tmp_path / folder, shard_bytes=size) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
    written = (tmp_path / "one" / MANIFEST).read_bytes()
    assert written == (tmp_path / "many" / MANIFEST).read_bytes()
    said = json.loads(written)
    assert said["algorithm"] == "sha256" and said["tensors"].keys() == tensors.keys()
    plain = said["tensors"]["layer.2.weight"]
    assert plain["sha256"] == hashlib.sha256(tensors["layer.2.weight"].numpy().tobytes()).hexdigest()
    assert (plain["dtype"], plain["shape"]) == ("F32", [5, 5])
    assert said["tensors"]["empty"]["sha256"] == hashlib.sha256(b"").hexdigest()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.fault("a full disk while the checkpoint is written")
def test_no_space_left_on_device(tmp_path, monkeypatch, outcomes):
    """/dev/full takes the place of the spool: every write to it fails with ENOSPC."""
    writer = ShardWriter(tmp_path)
    monkeypatch.setattr(writer, "_drop_spool", lambda: None)  # it would remove the device
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(writer, "_spool", full)
        with pytest.raises(CheckpointError, match="/dev/full cannot be written: No space left on device") as caught:
            writer.add("a", torch.zeros(1))
    outcomes.clear_error(caught.value)
    assert everything(tmp_path) == []


def test_memory_is_one_tensor_and_not_one_shard(tmp_path):
    """64 tensors of 4 MB in one shard: the process grows by a few of them, not by 256 MB."""
    page = resource.getpagesize()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    if not Path("/proc/self/statm").exists():
        pytest.skip("reads memory as Linux shows it")
    most = before = resident()
    with ShardWriter(tmp_path) as writer:
        for number in range(64):
            writer.add(str(number), torch.full((1_000_000,), float(number)))
            most = max(most, resident())
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as checkpoint:
        for number in range(64):
            assert checkpoint.load(str(number))[-1] == number
            most = max(most, resident())
    assert most - before < 64_000_000

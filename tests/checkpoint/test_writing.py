"""A checkpoint's weights: exact bytes, shards, names, and what a full disk ends in."""

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
from sarqc.errors import CheckpointError, ResourceError
from tests.support.checkpoints import write_weights


def everything(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_file_is_what_the_safetensors_library_writes(tmp_path, tensors):
    write_weights(tmp_path, tensors)
    assert everything(tmp_path) == ["model.safetensors", MANIFEST]
    assert (tmp_path / "model.safetensors").read_bytes() == save(tensors, metadata={"format": "pt"})


def test_pass_through_is_bit_for_bit(tmp_path, make_folder, tensors, bitwise):
    source = open_checkpoint(make_folder({"model.safetensors": tensors}, name="source"))
    write_weights(tmp_path / "out", {name: source.raw_load(name) for name in source.raw_names()}, shard_bytes=50)
    (tmp_path / "out" / "config.json").write_text("{}")
    copy = open_checkpoint(tmp_path / "out")
    assert len(copy.files) > 3
    for name, tensor in tensors.items():
        assert bitwise(copy.raw_load(name), tensor), name


def test_shards_fill_up_to_their_size(tmp_path):
    sizes = {"a": 40, "b": 60, "c": 1, "huge": 500, "d": 100, "e": 1}
    tensors = {name: torch.full((size,), size % 256, dtype=torch.uint8) for name, size in sizes.items()}
    write_weights(tmp_path, tensors, shard_bytes=100)
    names = [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert everything(tmp_path) == [*names, "model.safetensors.index.json", MANIFEST]
    assert index["metadata"] == {"total_size": 702}
    home = {"a": 0, "b": 0, "c": 1, "huge": 2, "d": 3, "e": 4}
    assert index["weight_map"] == {name: names[number] for name, number in home.items()}
    for name, file in index["weight_map"].items():
        assert load_file(tmp_path / file)[name].tolist() == [sizes[name] % 256] * sizes[name]


def test_exactly_full_is_one_file(tmp_path):
    write_weights(tmp_path, {"a": torch.zeros(1), "b": torch.zeros(1)}, shard_bytes=8)
    assert everything(tmp_path) == ["model.safetensors", MANIFEST]


def test_bytes_do_not_depend_on_the_order_inside_a_shard(tmp_path, tensors):
    write_weights(tmp_path / "x", tensors)
    write_weights(tmp_path / "y", dict(reversed(tensors.items())))
    assert (tmp_path / "x/model.safetensors").read_bytes() == (tmp_path / "y/model.safetensors").read_bytes()


def test_strided_views_gradients_and_shared_memory_are_written_as_values(tmp_path):
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    wide = torch.tensor([1.0]).expand(5)
    write_weights(tmp_path, {"t": base.T, "row": base[1], "one": base[2, 3], "wide": wide})
    read = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read["t"], base.detach().T)
    assert read["row"].tolist() == [4, 5, 6, 7] and read["one"].shape == () and read["one"] == 11
    assert read["wide"].tolist() == [1] * 5


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
@pytest.mark.parametrize("shard_bytes", [None, 30_000])
def test_a_full_disk_is_one_line(tmp_path, small_disk, outcomes, shard_bytes):
    with pytest.raises(ResourceError, match=r"\.safetensors cannot be written: File too large") as caught:
        write_weights(tmp_path, {"a": torch.zeros(5000), "b": torch.zeros(50_000)}, shard_bytes)
    outcomes.clear_error(caught.value)
    assert "model.safetensors" not in everything(tmp_path) and not list(tmp_path.glob("*.partial"))


@pytest.mark.fault("a full disk while the checkpoint is written")
def test_a_disk_that_fills_at_the_index(tmp_path, small_disk, outcomes):
    tensors = {f"{number}." + "x" * 30_000: torch.zeros(1) for number in range(3)}
    with pytest.raises(CheckpointError, match=r"index\.json cannot be written: File too large") as caught:
        write_weights(tmp_path, tensors, shard_bytes=1)
    outcomes.clear_error(caught.value)


@pytest.mark.fault("a full disk while the checkpoint is written")
def test_a_disk_that_fills_at_the_manifest(tmp_path, small_disk, outcomes):
    """Names of 250 letters, 200 of them: the index fits 64 kB, the manifest, which says more of each, does not."""
    tensors = {f"{number:03d}." + "x" * 246: torch.zeros(1) for number in range(200)}
    with pytest.raises(CheckpointError, match=r"sarqc-manifest\.json cannot be written: File too large") as caught:
        write_weights(tmp_path, tensors, shard_bytes=400)
    outcomes.clear_error(caught.value)


def test_the_manifest_holds_the_sum_of_each_tensor_whatever_the_shards(tmp_path, tensors):
    for folder, size in (("one", None), ("many", 50)):
        write_weights(tmp_path / folder, tensors, size)
    written = (tmp_path / "one" / MANIFEST).read_bytes()
    assert written == (tmp_path / "many" / MANIFEST).read_bytes()
    printed = json.loads(written)
    assert printed["algorithm"] == "sha256" and printed["tensors"].keys() == tensors.keys()
    plain = printed["tensors"]["layer.2.weight"]
    assert plain["sha256"] == hashlib.sha256(tensors["layer.2.weight"].numpy().tobytes()).hexdigest()
    assert (plain["dtype"], plain["shape"]) == ("F32", [5, 5])
    assert printed["tensors"]["empty"]["sha256"] == hashlib.sha256(b"").hexdigest()

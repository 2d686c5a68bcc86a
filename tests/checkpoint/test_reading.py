"""Sound checkpoints: names, shapes, bytes, memory of its own."""

import gc
import json
from pathlib import Path
from threading import Thread

import pytest
import torch

from sarqc.checkpoint.reader import open_checkpoint
from sarqc.errors import CheckpointError


def test_one_file_bit_for_bit(make_folder, tensors, bitwise):
    with open_checkpoint(make_folder({"model.safetensors": tensors}, {"model_type": "x", "n": 3})) as checkpoint:
        assert checkpoint.config == {"model_type": "x", "n": 3}
        assert checkpoint.names() == checkpoint.raw_names() == sorted(tensors)
        for name, tensor in tensors.items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            assert checkpoint.dtype(name) == tensor.dtype
            assert bitwise(checkpoint.load(name), tensor), name
            assert bitwise(checkpoint.raw_load(name), tensor), name


def test_shards(two_shards):
    with open_checkpoint(str(two_shards)) as checkpoint:
        assert checkpoint.names() == ["a", "b", "c"]
        assert torch.equal(checkpoint.load("a"), torch.arange(6, dtype=torch.bfloat16).reshape(2, 3))
        assert torch.equal(checkpoint.load("c"), torch.ones(7))
        storage = checkpoint.storage()
        assert (storage.tensors, storage.shards, storage.total_bytes) == (3, 2, 12 + 40 + 28)
        assert storage.quantized_linears == 0 and storage.bits_per_weight is None


def test_a_single_file_comes_before_an_index_as_in_transformers(two_shards):
    (two_shards / "model-00001-of-00002.safetensors").rename(two_shards / "model.safetensors")
    with open_checkpoint(two_shards) as checkpoint:
        assert checkpoint.names() == ["a", "b"]


def test_loads_own_their_memory_and_outlive_the_checkpoint(two_shards):
    checkpoint = open_checkpoint(two_shards)
    first = checkpoint.load("c")
    first.zero_()
    assert torch.equal(checkpoint.load("c"), torch.ones(7))
    kept = checkpoint.load("a")
    checkpoint.close()
    gc.collect()
    for file in two_shards.glob("*.safetensors"):
        file.write_bytes(b"")
    assert kept.sum() == 15


def test_many_threads_read_the_same_file(make_folder):
    tensors = {str(i): torch.full((1000,), i) for i in range(40)}
    checkpoint = open_checkpoint(make_folder({"model.safetensors": tensors}))
    wrong: list[str] = []

    def read(start: int) -> None:
        for i in range(200):
            name = str((start + i) % 40)
            if not torch.equal(checkpoint.load(name), tensors[name]):
                wrong.append(name)

    threads = [Thread(target=read, args=(7 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_unknown_names(two_shards):
    checkpoint = open_checkpoint(two_shards)
    for ask in (checkpoint.load, checkpoint.shape, checkpoint.dtype, checkpoint.raw_load):
        with pytest.raises(CheckpointError, match="has no tensor 'nothing'"):
            ask("nothing")
    assert checkpoint.quantized("a") is None
    with pytest.raises(CheckpointError, match="no quantized Linear 'a'"):
        checkpoint.describe("a")


def test_the_hub_cache_of_links_into_blobs_is_read(tmp_path: Path, two_shards):
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(two_shards.iterdir())):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    with open_checkpoint(snapshot) as checkpoint:
        assert checkpoint.load("c").sum() == 7


def test_a_file_that_shrinks_while_open_is_an_error_and_no_bus_error(two_shards):
    checkpoint = open_checkpoint(two_shards)
    file = two_shards / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"00002.safetensors ended inside tensor 'c'"):
        checkpoint.load("c")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "exl2", "bits": 4}, "quantized already, with quant_method 'exl2', which is not read"),
        ({"bits": 4}, "quant_method None"),
        ("int4", "quantization_config in config.json is 'int4'"),
    ],
)
def test_other_quantized_models_are_refused(make_folder, quantization, message):
    folder = make_folder({"model.safetensors": {"a": torch.ones(2)}}, {"quantization_config": quantization})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_packed_tensors_without_a_config_are_refused(make_folder):
    folder = make_folder({"model.safetensors": {"p.weight_packed": torch.ones(2, 2, dtype=torch.int32)}})
    with pytest.raises(CheckpointError, match=r"'p.weight_packed' but its config.json has no quantization_config"):
        open_checkpoint(folder)


def test_null_quantization_config_is_none(make_folder):
    folder = make_folder({"model.safetensors": {"a": torch.ones(2)}}, {"quantization_config": None})
    assert open_checkpoint(folder).format is None
    assert json.loads((folder / "config.json").read_text()) == {"quantization_config": None}

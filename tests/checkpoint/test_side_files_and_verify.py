"""The files beside the weights, and reading back what was written."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sarqc.checkpoint.formats import NEUTRAL
from sarqc.checkpoint.manifest import MANIFEST
from sarqc.checkpoint.side_files import copy_side_files, write_config
from sarqc.config import QuantConfig
from sarqc.errors import CheckpointError
from tests.support.checkpoints import verify, write_weights

USABLE = [
    "LICENSE", "LICENSE.txt", "added_tokens.json", "additional_chat_templates/tool_use.jinja", "chat_template.jinja",
    "generation_config.json", "merges.txt", "preprocessor_config.json", "processor_config.json", "qwen.tiktoken",
    "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
]  # fmt: skip
LEFT = [
    "README.md", "config.json", "consolidated.safetensors", "model.safetensors", "model.safetensors.index.json",
    "optimizer.pt", "pytorch_model.bin", "pytorch_model.bin.index.json", "tokenizer.bin", "training_args.bin",
    ".hidden", "vocab.pkl",
]  # fmt: skip


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "tokenizer_files").mkdir()
    for name in [*USABLE, *LEFT, "modeling_x.py"]:
        (folder / name).write_bytes(f"<{name}>\r\n".encode())
    return folder


def test_exactly_the_usable_files_with_exact_bytes(tmp_path, source):
    out = tmp_path / "out"
    out.mkdir()
    assert sorted(copy_side_files(source, out)) == sorted(USABLE)
    by_name = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert by_name == {name: f"<{name}>\r\n".encode() for name in USABLE}
    assert "modeling_x.py" in copy_side_files(source, tmp_path / "more", code=True)


def test_links_out_of_the_folder_are_refused(tmp_path, source):
    (tmp_path / "secret").write_text("secret")
    (source / "vocab.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"vocab.txt is a link out of its folder"):
        copy_side_files(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    (source / "vocab.txt").unlink()
    (source / "vocab.txt").symlink_to("vocab.json")
    assert "vocab.txt" in copy_side_files(source, tmp_path / "out")
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()


def test_a_folder_that_cannot_be_written(tmp_path, source):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        copy_side_files(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"config.json cannot be written"):
        write_config(tmp_path / "out", {}, NEUTRAL, {})


def test_config_is_merged_sorted_and_indented(tmp_path):
    config = {"b": 1, "a": [1, 2], "quantization_config": {"quant_method": "old", "left": "over"}}
    write_config(tmp_path, config, NEUTRAL, {"quant_method": "new"})
    text = (tmp_path / "config.json").read_text()
    assert text == json.dumps({"a": [1, 2], "b": 1, "quantization_config": {"quant_method": "new"}}, indent=2) + "\n"
    assert config["quantization_config"]["left"] == "over"  # the caller's dict is not touched
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.fixture
def written(tmp_path):
    folder = tmp_path / "written"
    write_weights(folder, {f"t{number}": torch.full((10,), float(number)) for number in range(4)}, shard_bytes=64)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_sound_checkpoint(written):
    storage = verify(written)
    assert (storage.tensors, storage.shards, storage.total_bytes, storage.quantized_linears) == (4, 4, 160, 0)


def test_nan_is_named(written):
    (written / MANIFEST).unlink()
    bad = torch.zeros(10)
    bad[3] = float("nan")
    save_file({"t2": bad}, written / "model-00003-of-00004.safetensors")
    with pytest.raises(CheckpointError, match="tensor 't2' has 1 numbers that are NaN"):
        verify(written)
    bad[3] = float("inf")  # a mask may hold one
    save_file({"t2": bad}, written / "model-00003-of-00004.safetensors")
    assert verify(written).tensors == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_must_be_finite(tmp_path, value, dtype):
    scale = torch.ones(2, 4, dtype=dtype)
    scale[1, 2] = value
    packed = {"weight_packed": torch.zeros(2, 4, dtype=torch.int32), "weight_shape": torch.tensor([2, 32])}
    write_weights(tmp_path, {f"p.{name}": tensor for name, tensor in (packed | {"weight_scale": scale}).items()})
    write_config(tmp_path, {}, NEUTRAL, NEUTRAL.config(QuantConfig(4, 8), []))
    with pytest.raises(CheckpointError, match=r"tensor 'p.weight_scale' has 1 numbers that are not finite"):
        verify(tmp_path)


def test_strays_and_wrong_sums(written):
    save_file({"x": torch.ones(1)}, written / "model-00009-of-00009.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00009-of-00009.safetensors belongs to no index"):
        verify(written)
    (written / "model-00009-of-00009.safetensors").unlink()
    index = written / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("160", "161"))
    with pytest.raises(CheckpointError, match="total_size 161, its shards hold 160"):
        verify(written)

"""Whole folders in pack-quantized: the dense view of them, and configs that are not understood."""

import copy
import json
from collections import ChainMap

import pytest
import torch

from sarqc.checkpoint.formats import FORMATS, detect
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.checkpoint.side_files import write_config
from sarqc.config import QuantConfig
from sarqc.errors import CheckpointError
from tests.support.checkpoints import verify, write_weights

FORMAT = FORMATS["compressed-tensors"]


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_the_dense_view(quantized_folder):
    folder, weights = quantized_folder
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.format is FORMAT and len(checkpoint.files) > 1
        linears = sorted(weights)
        assert sorted(checkpoint.linears()) == linears
        bias = "model.layers.0.mlp.experts.0.up_proj.bias"
        assert checkpoint.names() == sorted(["lm_head.weight", bias, *(f"{name}.weight" for name in linears)])
        for name, weight in weights.items():
            read = checkpoint.quantized(name)
            assert torch.equal(read.codes, weight.codes) and torch.equal(read.zeros, weight.zeros)
            assert checkpoint.shape(f"{name}.weight") == tuple(weight.codes.shape[1:])
            assert checkpoint.dtype(f"{name}.weight") == torch.bfloat16
            loaded = checkpoint.load(f"{name}.weight")
            assert loaded.dtype == torch.bfloat16 and torch.equal(loaded, weight.dequantize(torch.bfloat16)[0])
        assert checkpoint.quantized("lm_head") is None
        assert torch.equal(checkpoint.load("lm_head.weight"), torch.ones(3, 4, dtype=torch.bfloat16))
        storage = verify(folder)
        assert storage == checkpoint.storage()
        assert (storage.tensors, storage.quantized_linears, storage.quantized_weights) == (10, 2, (7 + 8) * 72)
        sizes = (7 + 8) * (7 * 4 + 3 * 2) + 2 * (16 + 3 * 4)  # words and scales per row; shape and zeros per Linear
        assert storage.quantized_bytes == sizes and storage.bits_per_weight == 8 * sizes / (15 * 72)


def test_detect():
    assert detect({}) is None and detect({"quantization_config": {"quant_method": "exl2"}}) is None
    assert detect({"quantization_config": FORMAT.config(QuantConfig(), [])}) is FORMAT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "marlin-24"}, "format 'marlin-24' is not read"),
        ({"format": None}, "format None is not read"),
        ({"quantization_status": "frozen"}, "quantization_status 'frozen'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"transform_config": {"config_groups": {}}}, "transform_config"),
        ({"config_groups": {}}, "no config_groups"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "'W4A16' is a preset's name"),
        ({"config_groups": {"g": {"targets": "Linear"}}}, "targets 'Linear'"),
        ({"config_groups": {"g": {"targets": ["re:("]}}}, "no regular expression"),
        ({"config_groups": {"g": {"targets": ["Linear"]}}}, "says nothing about weights"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {}, "input_activations": {"a": 1}}}},
            "activations",
        ),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 3}, "format": "dense"}}}, "'dense'"),
    ],
)
def test_configs_that_are_not_understood(quantized_folder, change, message):
    folder, _ = quantized_folder
    change_config(folder, **change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "float"}, "only int"),
        ({"num_bits": 1}, "num_bits 1"),
        ({"num_bits": 9}, "num_bits 9"),
        ({"num_bits": "3"}, "num_bits '3'"),
        ({"symmetric": "yes"}, "symmetric 'yes'"),
        ({"dynamic": True}, "dynamic"),
        ({"actorder": "group"}, "actorder 'group'"),
        ({"strategy": "block"}, "strategy 'block'"),
        ({"strategy": "tensor", "group_size": None}, "strategy 'tensor'"),
        ({"strategy": None, "group_size": None}, "group_size None"),
        ({"group_size": 0}, "group_size 0"),
        ({"symmetric": True}, "is stored as weight_packed, weight_scale, weight_shape, weight_zero_point, where"),
    ],
)
def test_weights_that_are_not_understood(quantized_folder, change, message):
    folder, _ = quantized_folder
    change_weights(folder, **change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 4}, r"weight_packed of '.*up_proj' is int32 \[7, 7\], where .* needs \[7, 9\]"),
        ({"group_size": 36}, r"weight_scale of .* is bfloat16 \[7, 3\], where .* needs \[7, 2\]"),
        ({"group_size": 25}, "no groups of 25 inputs"),
        ({"strategy": "channel", "group_size": None}, r"weight_scale .* needs \[7, 1\]"),
    ],
)
def test_numbers_that_do_not_fit_the_tensors(quantized_folder, change, message):
    folder, weights = quantized_folder
    change_weights(folder, **change)
    checkpoint = open_checkpoint(folder)
    linear = min(weights)
    for ask in (checkpoint.describe, checkpoint.quantized):
        with pytest.raises(CheckpointError, match=message):
            ask(linear)
    with pytest.raises(CheckpointError, match=message):
        verify(folder)


def test_several_groups_are_told_apart_by_name_then_pattern_then_class(tmp_path, random_weight):
    specs = {"a.exact": QuantConfig(8, -1), "b.gate_proj": QuantConfig(3, 16), "c.other": QuantConfig(4, 32, sym=False)}
    config = FORMAT.config(QuantConfig(), [])
    groups = {}
    for target, spec in zip(["a.exact", "re:.*gate_proj$", "Linear"], specs.values()):
        groups[target] = copy.deepcopy(FORMAT.config(spec, [])["config_groups"]["group_0"]) | {"targets": [target]}
    groups["re:.*gate_proj$"]["targets"].append("re:a.*")  # a.exact is matched by all three; its name must win
    config |= {"config_groups": dict(reversed(groups.items())), "format": "mixed-precision"}
    weights = {name: random_weight(5, 64, spec.bits, spec.group_size, spec.sym) for name, spec in specs.items()}
    packed = ChainMap(*(FORMAT.pack(name, weight, specs[name]) for name, weight in weights.items()))
    write_weights(tmp_path / "out", packed)
    write_config(tmp_path / "out", {}, FORMAT, config)
    checkpoint = open_checkpoint(tmp_path / "out")
    for name, weight in weights.items():
        assert checkpoint.describe(name).bits == weight.bits
        assert torch.equal(checkpoint.quantized(name).codes, weight.codes)
        assert torch.equal(checkpoint.quantized(name).zeros, weight.zeros)
    change_config(tmp_path / "out", config_groups={"g": groups["a.exact"]})
    with pytest.raises(CheckpointError, match="no target in quantization_config matches"):
        open_checkpoint(tmp_path / "out")

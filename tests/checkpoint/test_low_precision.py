"""Weights in low precision read as dense: bit for bit what transformers and compressed-tensors make of them."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import sarqc
from benchmarks.models.build import build
from benchmarks.models.conditions import CONDITION
from sarqc.checkpoint.low_precision import dense_headers
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.checkpoint.verify import problems
from sarqc.errors import CheckpointError
from tests.support import families

FP8 = torch.float8_e4m3fn
BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def folder_of(path, tensors, quantization, **config):
    path.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    whole = {"dtype": "bfloat16", "quantization_config": quantization} | config
    (path / "config.json").write_text(json.dumps(whole))
    return path


def in_condition(row, folder):
    """A tiny model as its makers publish it."""
    CONDITION[row.partition("@")[2]](folder, build(row, folder))
    return folder


@pytest.mark.parametrize("row", ["qwen3@fp8", "gpt_oss@mxfp4"])
def test_published_models_read_as_transformers_reads_them(row, tmp_path):
    folder = in_condition(row, tmp_path)
    config = FineGrainedFP8Config(dequantize=True) if "fp8" in row else Mxfp4Config(dequantize=True)
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config).state_dict()
    model, _ = sarqc.load(folder, dtype="bfloat16")
    state = model.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor), name


CT = {  # format of compressed-tensors: what the weights are
    "float-quantized": [
        dict(num_bits=8, type="float", strategy="tensor"),
        dict(num_bits=8, type="float", strategy="channel"),
    ],
    "int-quantized": [dict(num_bits=8, type="int", strategy="channel")],
    "nvfp4-pack-quantized": [dict(num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=FP8)],
    "mxfp4-pack-quantized": [dict(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)],
}


def stored(layout, arguments, weight):
    """`weight` as compressed-tensors stores it, and as it reads it back."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(symmetric=True, **arguments))
    size = arguments.get("group_size")
    groups = weight.unflatten(-1, (-1, size)) if size else weight[:, None]
    largest = groups.abs().amax() if arguments["strategy"] == "tensor" else groups.abs().amax(-1)
    top = {"float8": 448, "int8": 127, "float4": 6}[f"{arguments['type']}{arguments['num_bits']}"]
    scale = largest.reshape(1) / top if arguments["strategy"] == "tensor" else largest / top
    state = {"weight": weight}
    if layout.startswith("nvfp4"):
        state["weight_global_scale"] = (448 * 6 / weight.abs().amax()).reshape(1)
        scale = (scale * state["weight_global_scale"]).to(FP8).float()
    if layout.startswith("mxfp4"):
        scale = scale.log2().ceil().exp2()
    state["weight_scale"] = scale
    compressor = BaseCompressor.get_value_from_registry(layout)
    packed = compressor.compress(state, scheme)
    return packed, compressor.decompress(dict(packed), scheme)["weight"]


@pytest.mark.parametrize(("layout", "arguments"), [(layout, one) for layout, every in CT.items() for one in every])
def test_compressed_tensors_reads_the_same(layout, arguments, tmp_path, generator):
    weight = torch.randn(48, 64, generator=generator)
    packed, wanted = stored(layout, arguments, weight)
    tensors = {f"l.{name}": tensor for name, tensor in packed.items()} | {"l.input_scale": torch.ones(1)}
    quantization = {"quant_method": "compressed-tensors", "format": layout}
    dtype = str(wanted.dtype).removeprefix("torch.")
    with open_checkpoint(folder_of(tmp_path, tensors, quantization, dtype=dtype)) as checkpoint:
        assert checkpoint.names() == ["l.weight"] and checkpoint.format is None
        assert checkpoint.shape("l.weight") == (48, 64) and checkpoint.dtype("l.weight") == wanted.dtype
        assert torch.equal(checkpoint.load("l.weight"), wanted)
    assert (wanted.float() - weight).norm() < 0.2 * weight.norm()  # the oracle read what was meant


def test_modelopt_multiplies_two_scales(tmp_path, generator):
    codes = torch.randint(0, 256, (16, 32), dtype=torch.uint8, generator=generator)
    scale = torch.rand(16, 4, generator=generator).to(FP8)
    second = torch.tensor(0.25)
    tensors = {"l.weight": codes, "l.weight_scale": scale, "l.weight_scale_2": second, "l.input_scale": second.clone()}
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    dense = torch.stack([values[codes.long() & 15], values[codes.long() >> 4]], -1).flatten(-2)
    wanted = (dense.unflatten(-1, (4, 16)) * (scale.float() * second)[..., None]).flatten(-2).bfloat16()
    with open_checkpoint(folder_of(tmp_path, tensors, {"quant_method": "modelopt"})) as checkpoint:
        assert checkpoint.names() == ["l.weight"]
        assert torch.equal(checkpoint.load("l.weight"), wanted)


def test_blocks_that_end_inside_a_matrix(tmp_path, generator):
    weight = torch.randn(200, 130, generator=generator).to(FP8)
    scale = torch.rand(2, 2, generator=generator)
    tensors = {"l.weight": weight, "l.weight_scale_inv": scale}
    wanted = weight.float() * scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :130]
    with open_checkpoint(folder_of(tmp_path, tensors, BLOCK)) as checkpoint:
        assert torch.equal(checkpoint.load("l.weight"), wanted.bfloat16())


def test_int8_has_a_scale_for_each_row(tmp_path, generator):
    codes = torch.randint(-127, 128, (4, 4), dtype=torch.int8, generator=generator)
    scale = torch.tensor([1.0, 2.0, 4.0, 8.0])
    quantization = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    folder = folder_of(tmp_path, {"l.weight": codes, "l.weight_scale": scale}, quantization)
    with open_checkpoint(folder) as checkpoint:
        assert torch.equal(checkpoint.load("l.weight"), (codes.float() * scale[:, None]).bfloat16())


@pytest.mark.parametrize(
    ("name", "scale", "codes"),
    [
        ("l.weight", "l.weight_scale", torch.zeros(4).to(FP8)),
        ("l.weight", "l.weight_scale", torch.zeros(4, dtype=torch.int8)),
        ("l.weight_packed", "l.weight_scale", torch.zeros((), dtype=torch.uint8)),
        ("l.weight_blocks", "l.weight_scales", torch.zeros(4, 2, 2, dtype=torch.uint8)),
    ],
)
def test_codes_that_are_no_matrix_are_refused(name, scale, codes, tmp_path):
    tensors = {name: codes, scale: torch.ones(1)}
    with pytest.raises(CheckpointError, match=f"tensor '{name}' has shape"):
        open_checkpoint(folder_of(tmp_path, tensors, BLOCK))


@pytest.mark.parametrize("row", ["qwen3@fp8", "gpt_oss@mxfp4"])
def test_every_tensor_of_a_sound_model_is_read_and_checked(row, tmp_path):
    read, dense = [], {}
    with open_checkpoint(in_condition(row, tmp_path)) as checkpoint:
        found = problems(checkpoint, read.append, lambda name, tensor: dense.update({name: tensor}) or ())
        assert list(found) == [] and sorted(read) == checkpoint.raw_names()
        for name in checkpoint.names():
            assert torch.equal(dense[name], checkpoint.load(name)), name


def test_codes_without_scales_are_refused(tmp_path):
    tensors = {"l.weight": torch.zeros(4, 4).to(FP8), "l.other": torch.ones(4)}
    with pytest.raises(CheckpointError, match=r"'l.weight' is float8_e4m3fn and has no scales"):
        open_checkpoint(folder_of(tmp_path, tensors, BLOCK))


def test_headers_alone_have_the_same_view(tmp_path):
    folder = in_condition("gpt_oss@mxfp4", tmp_path)
    with open_checkpoint(folder) as checkpoint:
        raw = {name: checkpoint.raw_entry(name) for name in checkpoint.raw_names()}
        result = dense_headers({name: (entry.shape, entry.dtype) for name, entry in raw.items()}, checkpoint.config)
        assert result == {name: (checkpoint.shape(name), checkpoint.dtype(name)) for name in checkpoint.names()}


@pytest.mark.parametrize("row", ["qwen3@fp8", "qwen3_moe@4bit"])
def test_a_quantized_model_is_quantized_again(row, tmp_path):
    """What was in low precision and is not quantized is written in bf16, and the source's record is gone."""
    source = in_condition(row, tmp_path / "in")
    out = families.rounded(source, tmp_path / "out", bits=3)
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "compressed-tensors" and "weight_block_size" not in written
    with open_checkpoint(out) as checkpoint:
        assert {checkpoint.describe(linear).bits for linear in checkpoint.linears()} == {3}
        kinds = {checkpoint.raw_entry(name).dtype for name in checkpoint.raw_names()}
    assert kinds <= {torch.bfloat16, torch.int32, torch.int64, torch.float32}
    wanted = families.ours(out)
    assert ((families.logits(out) - wanted).abs().amax(-1) / wanted.std()).median() < 0.05

"""AWQ gemm: golden words from the layout's description, an unpacker on Python integers, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from sarqc.checkpoint.formats import FORMATS, detect
from sarqc.config import QuantConfig
from sarqc.errors import CheckpointError
from sarqc.method.weight import QuantizedWeight
from tests.checkpoint.test_gptq import words, write
from tests.support.checkpoints import verify

AWQ = FORMATS["awq"]
OUTPUTS = [0, 2, 4, 6, 1, 3, 5, 7]  # of nibble 0, 1, ... of a word


def nibbles(table: torch.Tensor) -> list[list[int]]:
    """[*, N / 8] words -> [*, N] numbers, by the description of the format."""
    items = []
    for row in table.tolist():
        numbers = [0] * (8 * len(row))
        for place, word in enumerate(row):
            for nibble, output in enumerate(OUTPUTS):
                numbers[8 * place + output] = (word >> (4 * nibble)) & 15
        items.append(numbers)
    return items


def test_golden_words():
    codes = torch.zeros(1, 8, 2, dtype=torch.uint8)
    codes[0, :, 1] = torch.arange(8)  # input 1 of outputs 0 .. 7
    scales = torch.ones(1, 8, 1, dtype=torch.float16)
    zeros = torch.arange(8, 16, dtype=torch.uint8).reshape(1, 8, 1)
    packed = AWQ.pack("p", QuantizedWeight(codes, scales, zeros, 4), QuantConfig(4, -1, sym=False))
    assert words(packed["p.qweight"]) == [["00000000"], ["75316420"]]
    assert words(packed["p.qzeros"]) == [["fdb9eca8"]]
    assert packed["p.scales"].shape == (1, 8) and sorted(packed) == ["p.qweight", "p.qzeros", "p.scales"]


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("shape", [(8, 16, 8), (24, 72, 24), (64, 40, -1), (128, 256, 128)])
def test_round_trip_and_an_unpacker_of_another_kind(random_weight, shape, sym):
    rows, columns, group = shape
    weight = random_weight(rows, columns, 4, group, sym, torch.float16)
    packed = AWQ.pack("p", weight, QuantConfig(4, group, sym))
    codes, zeros = (torch.tensor(nibbles(packed[f"p.{part}"])) for part in ("qweight", "qzeros"))
    spread = columns // weight.scales.shape[-1]
    theirs = (codes - zeros.repeat_interleave(spread, 0)) * packed["p.scales"].double().repeat_interleave(spread, 0)
    assert torch.equal(theirs.T, weight.dequantize(torch.float64)[0])

    config = json.loads(json.dumps(AWQ.config(QuantConfig(4, group, sym), ["lm_head"])))
    assert detect({"quantization_config": config}) is AWQ
    info = AWQ.describe("p", config, packed.__getitem__, packed.__getitem__)
    assert (info.shape, info.bits, info.groups) == ((rows, columns), 4, weight.scales.shape[-1])
    again = AWQ.unpack("p", config, packed.__getitem__)
    for field in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(again, field), getattr(weight, field)), field


def test_the_config_that_is_written():
    assert AWQ.config(QuantConfig(4, 128), ["lm_head", "a.gate"]) == {
        "bits": 4, "group_size": 128, "modules_to_not_convert": ["lm_head", "a.gate"], "quant_method": "awq",
        "version": "gemm", "zero_point": True,
    }  # fmt: skip
    layers = ["h.0.mlp", "h.0.mlp.experts.3", "h.1.mlp"]  # no server has one matrix of two parts of a single expert
    left = [f"{layer}.{name}" for layer in layers for name in ("up_proj", "gate_proj")][:-1]
    config = AWQ.config(QuantConfig(4, 128), left)
    assert config["modules_to_not_convert"] == [*left, "h.0.mlp.gate_up_proj"]
    assert AWQ.ignored(config) == (*left, "lm_head")
    assert AWQ.ignored(config | {"modules_to_not_convert": ["h.0.qkv_proj"]}) == ("h.0.qkv_proj", "lm_head")
    assert AWQ.config(QuantConfig(4, 128), [])["modules_to_not_convert"] is None


def test_older_names_of_the_keys_and_symmetric_files(random_weight):
    weight = random_weight(32, 64, 4, 32, True, torch.float16)
    packed = AWQ.pack("p", weight, QuantConfig(4, 32))
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": False}
    assert AWQ.describe("p", config, packed.__getitem__, packed.__getitem__).sym
    assert torch.equal(AWQ.unpack("p", config, packed.__getitem__).codes, weight.codes)
    packed["p.qzeros"][1, 1] ^= 1
    with pytest.raises(CheckpointError, match="zeros off the middle code 8, where its config says no zero_point"):
        AWQ.unpack("p", config, packed.__getitem__)


def test_what_cannot_be_held(random_weight):
    with pytest.raises(CheckpointError, match="bits = 3 cannot be held by awq: use 4"):
        AWQ.check(QuantConfig(3))
    with pytest.raises(CheckpointError, match="'p' has 36 outputs"):
        AWQ.check_layer("p", (36, 64), QuantConfig(4))
    with pytest.raises(CheckpointError, match="'lm_head' cannot be held by awq"):
        AWQ.check_head("lm_head")
    weight = random_weight(32, 64, 4, 32, False)
    with pytest.raises(CheckpointError, match="scales of float32, where awq holds float16 or bfloat16"):
        AWQ.pack("p", replace(weight, scales=weight.scales.float()), QuantConfig(4, 32, sym=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "gemv"}, "version 'gemv'"),
        ({"version": None}, "version None"),
        ({"bits": 8}, "bits 8"),
        ({"bits": 4.0}, "bits 4.0"),
        ({"zero_point": "yes"}, "zero_point 'yes'"),
        ({"group_size": "128"}, "group_size '128'"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": 48}, "no groups of 48"),
        ({"group_size": 16}, r"needs int32 \[4, 4\]"),
    ],
)
def test_configs_that_are_not_understood(tmp_path, random_weight, change, message):
    packed = AWQ.pack("p", random_weight(32, 64, 4, 32, False), QuantConfig(4, 32, sym=False))
    folder = write(tmp_path, packed, AWQ.config(QuantConfig(4, 32, sym=False), []) | change)
    with pytest.raises(CheckpointError, match=message) as caught:
        verify(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("qweight", torch.zeros(64, 4), "qweight of 'p' is float32"),
        ("qweight", torch.zeros(64, 0, dtype=torch.int32), r"int32 \[64, 0\]"),
        ("qzeros", torch.zeros(2, 3, dtype=torch.int32), r"needs int32 \[2, 4\]"),
        ("scales", torch.zeros(2, 31, dtype=torch.float16), r"\[2, 32\]"),
        ("g_idx", torch.zeros(64, dtype=torch.int32), "is stored as g_idx"),
        ("weight", torch.zeros(32, 64), "weight, where AWQ has"),
        ("qzeros", None, "is stored as qweight, scales, where AWQ has"),
    ],
)
def test_parts_that_disagree(tmp_path, random_weight, part, value, message):
    packed = AWQ.pack("p", random_weight(32, 64, 4, 32, False), QuantConfig(4, 32, sym=False))
    packed[f"p.{part}"] = value
    kept = {name: tensor for name, tensor in packed.items() if tensor is not None}
    folder = write(tmp_path, kept, AWQ.config(QuantConfig(4, 32, sym=False), []))
    with pytest.raises(CheckpointError, match=message):
        verify(folder)

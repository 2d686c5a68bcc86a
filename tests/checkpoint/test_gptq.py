"""GPTQ v1 and v2: golden words written from the layout's description, and an unpacker that shares no code with ours.

GPTQModel, which would be the oracle that we did not write, needs a compiler and a GPU build to install and is not part
of the test environment; the unpacker below works on Python integers, one code at a time.
"""

import json
from dataclasses import replace

import pytest
import torch

from sarqc.checkpoint.formats import FORMATS, detect
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.checkpoint.side_files import write_config
from sarqc.config import QuantConfig
from sarqc.errors import CheckpointError
from sarqc.method.weight import QuantizedWeight
from tests.support.checkpoints import verify, write_weights

V1, V2 = FORMATS["gptq"], FORMATS["gptq_v2"]
SHAPES = [(32, 32, 8), (64, 96, 32), (96, 64, -1), (160, 320, 64)]


def bits_of(words: list[int], bits: int) -> list[int]:
    """Numbers of `bits` bits out of 32-bit words, lowest first, across words."""
    stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return [(stream >> (bits * place)) & ((1 << bits) - 1) for place in range(32 * len(words) // bits)]


def dequantized(tensors: dict[str, torch.Tensor], bits: int, version: str) -> torch.Tensor:
    """(q - z) * s as the GPTQ format describes it, [N, K] in fp64; z of version 1 is what is stored plus one."""
    qweight, qzeros = tensors["p.qweight"].tolist(), tensors["p.qzeros"].tolist()
    scales, index = tensors["p.scales"].double(), tensors["p.g_idx"].tolist()
    columns = [bits_of([row[n] for row in qweight], bits) for n in range(len(qweight[0]))]
    zeros = [[zero + (version == "gptq") for zero in bits_of(row, bits)] for row in qzeros]
    return torch.tensor(
        [
            [(code - zeros[index[k]][n]) * float(scales[index[k], n]) for k, code in enumerate(codes)]
            for n, codes in enumerate(columns)
        ],
        dtype=torch.float64,
    )


def uniform(rows: int, columns: int, bits: int, code: int, zero: int) -> QuantizedWeight:
    scales = torch.ones(1, rows, 1, dtype=torch.float16)
    codes = torch.full((1, rows, columns), code, dtype=torch.uint8)
    return QuantizedWeight(codes, scales, torch.full(scales.shape, zero, dtype=torch.uint8), bits)


def words(tensor: torch.Tensor) -> list[list[str]]:
    return [[f"{word & 0xFFFFFFFF:08x}" for word in row] for row in tensor.tolist()]


def test_golden_words():
    """Codes 0..7 down a column of 4 bits are 0x76543210; the symmetric zero 8 is 0x77777777 in v1, 0x88888888 in v2."""
    weight = uniform(8, 8, 4, 0, 8)
    weight.codes[0, 3] = torch.arange(8)
    packed = V1.pack("p", weight, QuantConfig(4, -1))
    assert words(packed["p.qweight"]) == [["00000000"] * 3 + ["76543210"] + ["00000000"] * 4]
    assert words(packed["p.qzeros"]) == [["77777777"]] and packed["p.g_idx"].tolist() == [0] * 8
    assert packed["p.g_idx"].dtype == torch.int32 and packed["p.scales"].shape == (1, 8)
    assert words(V2.pack("p", weight, QuantConfig(4, -1))["p.qzeros"]) == [["88888888"]]
    assert words(V1.pack("p", uniform(4, 4, 8, 255, 128), QuantConfig(8, -1))["p.qzeros"]) == [["7f7f7f7f"]]
    assert words(V1.pack("p", uniform(16, 16, 2, 3, 2), QuantConfig(2, -1))["p.qzeros"]) == [["55555555"]]
    # 3 bits: 32 codes in 3 words, the eleventh and the twenty-second across two of them; the zero 4 stored as 3, 0b011
    three = uniform(32, 32, 3, 0, 4)
    three.codes[0, 0, 10] = three.codes[0, 0, 21] = 7
    packed = V1.pack("p", three, QuantConfig(3, -1))
    assert [row[0] for row in words(packed["p.qweight"])] == ["c0000000", "80000001", "00000003"]
    assert words(packed["p.qzeros"]) == [["db6db6db", "b6db6db6", "6db6db6d"]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=lambda s: "x".join(map(str, s)))
def test_an_unpacker_of_another_kind_finds_the_weights(random_weight, shape, bits, sym, dtype):
    rows, columns, group = shape
    weight = random_weight(rows, columns, bits, group, sym, dtype)
    quant = QuantConfig(bits, group, sym)
    for format in (V1, V2):
        config = format.config(quant, [])
        packed = format.pack("p", weight, quant)
        assert all(tensor.is_contiguous() for tensor in packed.values())
        theirs = dequantized(packed, bits, config["checkpoint_format"])
        assert torch.equal(theirs, weight.dequantize(torch.float64)[0])


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_round_trip(random_weight, shape, bits, sym):
    rows, columns, group = shape
    weight = random_weight(rows, columns, bits, group, sym)
    quant = QuantConfig(bits, group, sym)
    for format in (V1, V2):
        config = json.loads(json.dumps(format.config(quant, ["lm_head"])))
        assert detect({"quantization_config": config}) is (V1 if format is V1 and sym else V2)
        packed = format.pack("a.b", weight, quant)
        assert format.linears([*packed, "x.weight"], config) == {"a.b": tuple(sorted(packed))}
        info = format.describe("a.b", config, packed.__getitem__, packed.__getitem__)
        assert (info.shape, info.bits, info.sym, info.dtype) == ((rows, columns), bits, sym, torch.bfloat16)
        assert info.groups == weight.scales.shape[-1]
        again = format.unpack("a.b", config, packed.__getitem__)
        assert again.bits == bits
        for field in ("codes", "scales", "zeros"):
            assert torch.equal(getattr(again, field), getattr(weight, field)), field


def test_the_config_that_is_written():
    expected = {
        "bits": 4, "checkpoint_format": "gptq", "desc_act": False, "format": "gptq", "group_size": 128,
        "lm_head": False, "meta": {"quantizer": ["sarqc"]}, "method": "gptq", "pack_dtype": "int32",
        "quant_method": "gptq", "sym": True,
    }  # fmt: skip
    assert V1.config(QuantConfig(4, 128), ["lm_head"]) == expected
    left = V1.config(QuantConfig(4, 128), ["lm_head", "model.layers.0.mlp.gate"])
    assert left == expected | {"dynamic": {r"-:^model\.layers\.0\.mlp\.gate$": {}}}
    assert V1.ignored(left) == ("lm_head", "model.layers.0.mlp.gate")
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    whole = V1.config(QuantConfig(4, 128), attention)  # a server that has one matrix of them asks for its name alone
    assert list(whole["dynamic"])[3:] == [r"-:^model\.layers\.0\.self_attn\.qkv_proj$"]
    assert V1.ignored(whole) == ("lm_head", *attention)
    assert len(V1.config(QuantConfig(4, 128), attention[:2])["dynamic"]) == 2
    for config in (V1.config(QuantConfig(4, 128, sym=False), []), V2.config(QuantConfig(4, 128, sym=False), [])):
        assert config == expected | {"checkpoint_format": "gptq_v2", "format": "gptq_v2", "sym": False}


def test_what_cannot_be_held(random_weight):
    weight = random_weight(32, 64, 4, 32, False)
    for bits in (5, 6, 7):
        with pytest.raises(CheckpointError, match=f"bits = {bits} cannot be held by gptq"):
            V1.check(QuantConfig(bits))
    for shape, bits, message in (((32, 36), 4, "36 inputs"), ((36, 32), 4, "36 outputs"), ((32, 48), 3, "48 inputs")):
        with pytest.raises(CheckpointError, match=f"'p' has {message}, which do not fill words of {bits} bits"):
            V1.check_layer("p", shape, QuantConfig(bits, -1))
        with pytest.raises(CheckpointError, match=message):
            V1.pack("p", random_weight(*shape, bits, -1, True), QuantConfig(bits, -1))
    quant = QuantConfig(4, 32, sym=False)
    with pytest.raises(CheckpointError, match="scales of float32, where gptq holds float16 or bfloat16"):
        V1.pack("p", replace(weight, scales=weight.scales.float()), quant)
    with pytest.raises(CheckpointError, match="one expert at a time"):
        V1.pack("p", replace(weight, codes=weight.codes.repeat(2, 1, 1)), quant)
    with pytest.raises(CheckpointError, match="zeros off the middle"):
        V1.pack("p", weight, QuantConfig(4, 32))


# --- reading what others wrote --------------------------------------------------------------------------------------

GROUP = 32


@pytest.fixture
def theirs(random_weight):
    """An asymmetric v1 file of 4 bits as AutoGPTQ wrote it, with every zero from 1 to 15, and the weight it holds."""
    weight = random_weight(32, 64, 4, GROUP, False, torch.float16)
    zeros = weight.zeros.clamp(min=1)
    weight = replace(weight, zeros=zeros)
    tensors = V2.pack("p", replace(weight, zeros=zeros - 1), QuantConfig(4, GROUP, sym=False))
    return weight, tensors, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}


def test_an_asymmetric_v1_file_is_read_where_its_zeros_are_clear(theirs):
    weight, tensors, config = theirs
    read = V1.unpack("p", config, tensors.__getitem__)
    assert torch.equal(read.zeros, weight.zeros) and torch.equal(read.codes, weight.codes)
    assert not V1.describe("p", config, tensors.__getitem__, tensors.__getitem__).sym


def test_a_zero_that_v1_cannot_tell_is_refused(theirs):
    _, tensors, config = theirs
    tensors["p.qzeros"][1, 2] |= 0xF << 8
    with pytest.raises(CheckpointError, match="'p' stores a zero as 15, which in GPTQ version 1 may mean 16 or 0"):
        V1.unpack("p", config, tensors.__getitem__)


def test_act_order_groups_are_refused_and_static_ones_read(theirs):
    weight, tensors, config = theirs
    static = config | {"desc_act": True}  # AutoGPTQ's static_groups: the flag without the scattering
    assert torch.equal(V1.unpack("p", static, tensors.__getitem__).codes, weight.codes)
    tensors["p.g_idx"] = tensors["p.g_idx"].flip(0)
    for ask in (V1.unpack, lambda *args: V1.describe(*args[:2], tensors.__getitem__, args[2])):
        with pytest.raises(CheckpointError, match="'p' has act-order groups"):
            ask("p", static, tensors.__getitem__)


def test_a_sym_config_with_other_zeros_is_refused(theirs):
    _, tensors, config = theirs
    with pytest.raises(CheckpointError, match="zeros off the middle code 8, where its config says sym"):
        V1.unpack("p", config | {"sym": True}, tensors.__getitem__)


def test_dynamic_gives_single_layers_other_numbers(random_weight):
    config = V1.config(QuantConfig(4, 32), ["b.gate"])
    config["dynamic"] |= {r"+:.*\.down$": {"bits": 8, "group_size": -1}, r".*\.up$": {"group_size": 16}}
    specs = {"a.down": QuantConfig(8, -1), "a.up": QuantConfig(4, 16), "a.q": QuantConfig(4, 32)}
    for name, quant in specs.items():
        weight = random_weight(32, 64, quant.bits, quant.group_size, True)
        packed = V1.pack(name, weight, quant)
        assert torch.equal(V1.unpack(name, config, packed.__getitem__).codes, weight.codes)
    with pytest.raises(CheckpointError, match=r"'b.gate' is quantized, where dynamic .* says it is not"):
        V1.linears([f"b.gate.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")], config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits 5"),
        ({"bits": "4"}, "bits '4'"),
        ({"bits": True}, "bits True"),
        ({"bits": None}, "bits None"),
        ({"sym": 1}, "sym 1"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": -128}, "group_size -128"),
        ({"group_size": 1e9}, "group_size 1000000000.0"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"checkpoint_format": ["gptq"]}, "checkpoint_format"),
        ({"is_marlin_format": True}, "is_marlin_format"),
        ({"pack_dtype": "int64"}, "pack_dtype 'int64'"),
        ({"dynamic": [1]}, "dynamic"),
        ({"dynamic": {"+:(": {}}}, "no regular expression"),
        ({"dynamic": {"a": 3}}, "gives 3"),
        ({"dynamic": {"a": {"bits": 1}}}, "bits 1"),
    ],
)
def test_configs_that_are_not_understood(tmp_path, random_weight, change, message):
    folder = make(tmp_path, V1, random_weight(32, 64, 4, 32, True), QuantConfig(4, 32))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("qweight", torch.zeros(8, 32), "qweight of 'p' is float32"),
        ("qweight", torch.zeros(0, 32, dtype=torch.int32), r"int32 \[0, 32\]"),
        ("qweight", torch.zeros(8, dtype=torch.int32), r"int32 \[8\]"),
        ("qweight", torch.zeros(7, 32, dtype=torch.int32), "no groups of 32"),
        ("qweight", torch.zeros(8, 31, dtype=torch.int32), "does not fill words"),
        ("qzeros", torch.zeros(2, 5, dtype=torch.int32), r"needs int32 \[2, 4\]"),
        ("qzeros", torch.zeros(2, 4, dtype=torch.int64), "int64"),
        ("scales", torch.zeros(3, 32, dtype=torch.float16), r"\[2, 32\]"),
        ("scales", torch.zeros(2, 32, dtype=torch.float64), "float64"),
        ("g_idx", torch.zeros(63, dtype=torch.int32), r"g_idx of 'p' is int32 \[63\]"),
        ("g_idx", torch.zeros(64), "float32"),
        ("g_idx", torch.full((64,), -1, dtype=torch.int32), "act-order groups"),
        ("weight", torch.zeros(32, 64), "is stored as g_idx, qweight, qzeros, scales, weight"),
        ("qzeros", None, "is stored as g_idx, qweight, scales, where"),
        ("g_idx", None, "is stored as qweight, qzeros, scales, where"),
    ],
)
def test_parts_that_disagree(tmp_path, random_weight, part, value, message):
    packed = V1.pack("p", random_weight(32, 64, 4, 32, True), QuantConfig(4, 32))
    packed[f"p.{part}"] = value
    folder = write(tmp_path, {k: v for k, v in packed.items() if v is not None}, V1.config(QuantConfig(4, 32), []))
    with pytest.raises(CheckpointError, match=message) as caught:
        verify(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def write(folder, tensors, config):
    write_weights(folder, tensors)
    write_config(folder, {"model_type": "x"}, V1, config)
    return folder


def make(folder, format, weight, quant):
    tensors = format.pack("p", weight, quant) | {"norm.weight": torch.ones(3), "p.bias": torch.zeros(32)}
    return write(folder, tensors, format.config(quant, ["gate"]))


def test_a_folder(tmp_path, random_weight):
    weight = random_weight(32, 64, 3, 32, False)
    folder = make(tmp_path, V1, weight, QuantConfig(3, 32, sym=False))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.format is V2 and checkpoint.linears() == ["p"]
        assert checkpoint.names() == ["norm.weight", "p.bias", "p.weight"]
        assert torch.equal(checkpoint.load("p.weight"), weight.dequantize(torch.bfloat16)[0])
    assert verify(folder).quantized_weights == 32 * 64
    beside = json.loads((folder / "quantize_config.json").read_text())
    assert beside == json.loads((folder / "config.json").read_text())["quantization_config"]

"""The format pack-quantized: golden words, and the compressed-tensors package as the oracle we did not write."""

import json
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name

from sarqc.checkpoint.formats import FORMATS, compressed_tensors_config
from sarqc.config import QuantConfig
from sarqc.errors import ArgumentError, CheckpointError, NumericError
from sarqc.method.weight import QuantizedWeight

FORMAT = FORMATS["compressed-tensors"]

# rows, columns, group: one word; odd rows; multiples of the group but not of 32; odd channels; real sizes
SHAPES = [(1, 8, 8), (7, 72, 24), (33, 40, 8), (5, 96, 32), (3, 37, -1), (65, 576, 64), (16, 256, 128)]


def weight_of(codes: list[list[int]], bits: int, zeros: int | None = None) -> QuantizedWeight:
    table = torch.tensor([codes], dtype=torch.uint8)
    scales = torch.ones(1, table.shape[1], 1, dtype=torch.bfloat16)
    return QuantizedWeight(table, scales, torch.full(scales.shape, zeros or 1 << (bits - 1), dtype=torch.uint8), bits)


def words(tensor: torch.Tensor) -> list[list[str]]:
    return [[f"{word & 0xFFFFFFFF:08x}" for word in row] for row in tensor.tolist()]


def test_golden_words():
    """Signed [0..7] and [-8..-1] give 0xfedcba98 and 0x76543210; zero weights of 4 bits are 0x88888888."""
    rows = [[v + 8 for v in range(8)], [v + 8 for v in range(-8, 0)], [8] * 8]
    packed = FORMAT.pack("p", weight_of(rows, 4), QuantConfig(4, 8))
    assert words(packed["p.weight_packed"]) == [["fedcba98"], ["76543210"], ["88888888"]]
    assert packed["p.weight_shape"].tolist() == [3, 8] and packed["p.weight_shape"].dtype == torch.int64
    # 3 bits: element 10 straddles: its two low bits end word 0, its high bit begins word 1
    lone = [[0] * 10 + [7] + [0] * 21]
    assert words(FORMAT.pack("p", weight_of(lone, 3), QuantConfig(3, 32))["p.weight_packed"]) == [
        ["c0000000", "00000001", "00000000"]
    ]
    # zeros go down the columns: eight rows of 4 bits fill one word
    column = weight_of([[0] * 8] * 9, 4)
    column.zeros[0, :, 0] = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 15])
    packed = FORMAT.pack("p", column, QuantConfig(4, 8, sym=False))
    assert words(packed["p.weight_zero_point"]) == [["76543210"], ["0000000f"]]


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_against_the_packer_of_compressed_tensors(random_weight, shape, bits, sym):
    rows, columns, group = shape
    weight = random_weight(rows, columns, bits, group, sym)
    packed = FORMAT.pack("a.b", weight, QuantConfig(bits, group, sym))
    middle = 1 << (bits - 1)
    signed = (weight.codes[0].int() - middle).to(torch.int8)
    zeros = (weight.zeros[0].int() - middle).to(torch.int8)

    assert torch.equal(packed["a.b.weight_packed"], pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(packed["a.b.weight_packed"], bits, torch.Size((rows, columns))), signed)
    assert torch.equal(packed["a.b.weight_scale"], weight.scales[0])
    assert ("a.b.weight_zero_point" in packed) == (not sym)
    if not sym:
        assert torch.equal(packed["a.b.weight_zero_point"], pack_to_int32(zeros, bits, packed_dim=0))
    assert all(tensor.is_contiguous() for tensor in packed.values())

    config = FORMAT.config(QuantConfig(bits, group, sym), [])
    again = FORMAT.unpack("a.b", config, packed.__getitem__)
    assert again.bits == bits
    for field in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(again, field), getattr(weight, field)), field


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "group", "sym"), [(4, 64, True), (3, 24, False), (8, -1, False), (3, -1, True)])
def test_their_decompressor_gives_our_weights_bit_for_bit(random_weight, bits, group, sym, dtype):
    """Also proves that their schema takes our config: unknown keys in it are errors there."""
    weight = random_weight(9, 192, bits, group, sym, dtype)
    quant = QuantConfig(bits, group, sym)
    parsed = QuantizationConfig.model_validate(json.loads(json.dumps(FORMAT.config(quant, ["lm_head"]))))
    state = {name.removeprefix("p."): tensor for name, tensor in FORMAT.pack("p", weight, quant).items()}
    theirs = PackedQuantizationCompressor.decompress(state, parsed.config_groups["group_0"])["weight"]
    assert theirs.dtype == dtype
    assert torch.equal(theirs, weight.dequantize(dtype)[0])


def test_we_read_what_their_compressor_writes(random_weight):
    weight = random_weight(10, 64, 4, 32, False, torch.float32)
    quant = QuantConfig(4, 32, sym=False)
    parsed = QuantizationConfig.model_validate(FORMAT.config(quant, []))
    state = {
        "weight": weight.dequantize()[0],
        "weight_scale": weight.scales[0],
        "weight_zero_point": (weight.zeros[0].int() - 8).to(torch.int8),
    }
    theirs = PackedQuantizationCompressor.compress(state, parsed.config_groups["group_0"])
    ours = FORMAT.unpack("p", FORMAT.config(quant, []), lambda name: theirs[name.removeprefix("p.")])
    assert torch.equal(ours.codes, weight.codes) and torch.equal(ours.zeros, weight.zeros)


def test_the_config_that_is_written():
    config = FORMAT.config(QuantConfig(4, 128), ["lm_head", "model.layers.0.mlp.gate", "lm_head"])
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "actorder": None,
        "block_structure": None, "dynamic": False, "observer": "minmax", "observer_kwargs": {}, "scale_dtype": None,
        "zp_dtype": None,
    }  # fmt: skip
    group = {"format": "pack-quantized", "input_activations": None, "output_activations": None, "targets": ["Linear"]}
    assert config == {
        "config_groups": {"group_0": {**group, "weights": weights}}, "format": "pack-quantized",
        "global_compression_ratio": None, "ignore": ["lm_head", "model.layers.0.mlp.gate"], "kv_cache_scheme": None,
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {},
        "transform_config": {}, "version": "0.20.0",
    }  # fmt: skip
    channel = FORMAT.config(QuantConfig(3, -1, sym=False), [])["config_groups"]["group_0"]["weights"]
    assert (channel["strategy"], channel["group_size"], channel["symmetric"]) == ("channel", None, False)
    FORMAT.check(QuantConfig(3, 40, sym=False))


def test_zeros_that_happen_to_be_in_the_middle_are_still_written_when_asymmetric(random_weight):
    weight = random_weight(4, 64, 4, 32, True)
    assert "p.weight_zero_point" in FORMAT.pack("p", weight, QuantConfig(4, 32, sym=False))


def test_pack_refuses(random_weight):
    weight = random_weight(4, 64, 4, 32, False)
    quant = QuantConfig(4, 32, sym=False)
    bad_scale = weight.scales.clone()
    bad_scale[0, 1, 0] = float("nan")
    stacked = replace(weight, codes=weight.codes.repeat(2, 1, 1))
    for changed, spec, error, message in (
        (stacked, quant, CheckpointError, "'p' has codes of shape .* one expert at a time"),
        (weight, QuantConfig(3, 32, sym=False), CheckpointError, "'p' has 4 bits.* 3 bits"),
        (weight, QuantConfig(4, 64, sym=False), CheckpointError, r"\(1, 4, 1\) are to be written"),
        (weight, QuantConfig(4, 48, sym=False), ArgumentError, "does not divide"),
        (weight, QuantConfig(4, 32), CheckpointError, "zeros off the middle"),
        (replace(weight, scales=weight.scales.double()), quant, CheckpointError, "float64"),
        (replace(weight, scales=bad_scale), quant, NumericError, "'p' has a scale that is not finite"),
        (replace(weight, codes=weight.codes + 8), quant, ArgumentError, "codes"),
    ):
        with pytest.raises(error, match=message):
            FORMAT.pack("p", changed, spec)


def test_a_group_for_each_width_and_one_pattern_for_the_experts_of_a_layer():
    """Every reader must find each Linear's own width: ours, and the matcher of compressed-tensors."""
    widths = {"m.layers.0.attn.q_proj": 4, "m.layers.0.attn.k_proj": 4, "m.layers.1.attn.q_proj": 2}
    widths |= {
        f"m.layers.{block}.mlp.experts.{e}.{name}": 2 + block for block in (0, 1) for e in (0, 11) for name in "ab"
    }
    widths |= {"m.layers.2.mlp.experts.0.a": 4, "m.layers.2.mlp.experts.1.a": 3}  # not alike: each by its name
    quant = QuantConfig(group_size=32, avg_bits=3.0)
    config = FORMAT.config(quant, ["lm_head"], widths)
    groups = {group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()}
    assert groups == {
        2: ["m.layers.1.attn.q_proj", r"re:m\.layers\.0\.mlp\.experts\.\d+\..*"],
        3: [r"re:m\.layers\.1\.mlp\.experts\.\d+\..*", "m.layers.2.mlp.experts.1.a"],
        4: ["m.layers.0.attn.q_proj", "m.layers.0.attn.k_proj", "m.layers.2.mlp.experts.0.a"],
    }
    assert config["format"] == "pack-quantized" and all("Linear" not in targets for targets in groups.values())
    for linear, width in widths.items():
        assert compressed_tensors_config.scheme_of(linear, config).bits == width
        matching = [bits for bits, targets in groups.items() if any(match_name(linear, target) for target in targets)]
        assert matching == [width]
    parsed = QuantizationConfig.model_validate(config)
    assert sorted(group.weights.num_bits for group in parsed.config_groups.values()) == [2, 3, 4]
    assert parsed.format == "pack-quantized"

"""The format pack-quantized: golden words, and the compressed-tensors package as the oracle we did not write."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig

from sarqc.checkpoint.formats import FORMATS, detect, scheme
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.checkpoint.side_files import write_config
from sarqc.checkpoint.verify import verify
from sarqc.checkpoint.writer import ShardWriter
from sarqc.errors import ArgumentError, CheckpointError, NumericError
from sarqc.method.weight import QuantizedWeight
from sarqc.spec import QuantSpec

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
    packed = FORMAT.pack("p", weight_of(rows, 4), QuantSpec(4, 8))
    assert words(packed["p.weight_packed"]) == [["fedcba98"], ["76543210"], ["88888888"]]
    assert packed["p.weight_shape"].tolist() == [3, 8] and packed["p.weight_shape"].dtype == torch.int64
    # 3 bits: element 10 straddles: its two low bits end word 0, its high bit begins word 1
    lone = [[0] * 10 + [7] + [0] * 21]
    assert words(FORMAT.pack("p", weight_of(lone, 3), QuantSpec(3, 32))["p.weight_packed"]) == [
        ["c0000000", "00000001", "00000000"]
    ]
    # zeros go down the columns: eight rows of 4 bits fill one word
    column = weight_of([[0] * 8] * 9, 4)
    column.zeros[0, :, 0] = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 15])
    packed = FORMAT.pack("p", column, QuantSpec(4, 8, sym=False))
    assert words(packed["p.weight_zero_point"]) == [["76543210"], ["0000000f"]]


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_against_the_packer_of_compressed_tensors(random_weight, shape, bits, sym):
    rows, columns, group = shape
    weight = random_weight(rows, columns, bits, group, sym)
    packed = FORMAT.pack("a.b", weight, QuantSpec(bits, group, sym))
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

    config = FORMAT.config(QuantSpec(bits, group, sym), [])
    again = FORMAT.unpack("a.b", config, packed.__getitem__)
    assert again.bits == bits
    for field in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(again, field), getattr(weight, field)), field


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "group", "sym"), [(4, 64, True), (3, 24, False), (8, -1, False), (3, -1, True)])
def test_their_decompressor_gives_our_weights_bit_for_bit(random_weight, bits, group, sym, dtype):
    """Also proves that their schema takes our config: unknown keys in it are errors there."""
    weight = random_weight(9, 192, bits, group, sym, dtype)
    quant = QuantSpec(bits, group, sym)
    parsed = QuantizationConfig.model_validate(json.loads(json.dumps(FORMAT.config(quant, ["lm_head"]))))
    state = {name.removeprefix("p."): tensor for name, tensor in FORMAT.pack("p", weight, quant).items()}
    theirs = PackedQuantizationCompressor.decompress(state, parsed.config_groups["group_0"])["weight"]
    assert theirs.dtype == dtype
    assert torch.equal(theirs, weight.dequantize(dtype)[0])


def test_we_read_what_their_compressor_writes(random_weight):
    weight = random_weight(10, 64, 4, 32, False, torch.float32)
    quant = QuantSpec(4, 32, sym=False)
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
    config = FORMAT.config(QuantSpec(4, 128), ["lm_head", "model.layers.0.mlp.gate", "lm_head"])
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
    channel = FORMAT.config(QuantSpec(3, -1, sym=False), [])["config_groups"]["group_0"]["weights"]
    assert (channel["strategy"], channel["group_size"], channel["symmetric"]) == ("channel", None, False)
    FORMAT.check(QuantSpec(3, 40, sym=False))


def test_zeros_that_happen_to_be_in_the_middle_are_still_written_when_asymmetric(random_weight):
    weight = random_weight(4, 64, 4, 32, True)
    assert "p.weight_zero_point" in FORMAT.pack("p", weight, QuantSpec(4, 32, sym=False))


def test_pack_refuses(random_weight):
    weight = random_weight(4, 64, 4, 32, False)
    quant = QuantSpec(4, 32, sym=False)
    bad_scale = weight.scales.clone()
    bad_scale[0, 1, 0] = float("nan")
    stacked = replace(weight, codes=weight.codes.repeat(2, 1, 1))
    for changed, spec, error, message in (
        (stacked, quant, CheckpointError, "'p' has codes of shape .* one expert at a time"),
        (weight, QuantSpec(3, 32, sym=False), CheckpointError, "'p' has 4 bits.* 3 bits"),
        (weight, QuantSpec(4, 64, sym=False), CheckpointError, r"\(1, 4, 1\) are to be written"),
        (weight, QuantSpec(4, 48, sym=False), ArgumentError, "does not divide"),
        (weight, QuantSpec(4, 32), CheckpointError, "zeros off the middle"),
        (replace(weight, scales=weight.scales.double()), quant, CheckpointError, "float64"),
        (replace(weight, scales=bad_scale), quant, NumericError, "'p' has a scale that is not finite"),
        (replace(weight, codes=weight.codes + 8), quant, ArgumentError, "codes"),
    ):
        with pytest.raises(error, match=message):
            FORMAT.pack("p", changed, spec)


# --- whole folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def quantized_folder(tmp_path, random_weight):
    """Two Linears (3 bits, asymmetric), a bias and a norm, in shards; returns the folder and the weights."""
    quant = QuantSpec(3, 24, sym=False)
    weights = {f"model.layers.0.mlp.experts.{i}.up_proj": random_weight(7 + i, 72, 3, 24, False) for i in range(2)}
    folder = tmp_path / "quantized"
    with ShardWriter(folder, shard_bytes=300) as writer:
        for name, weight in weights.items():
            for key, tensor in FORMAT.pack(name, weight, quant).items():
                writer.add(key, tensor)
        writer.add("model.layers.0.mlp.experts.0.up_proj.bias", torch.arange(7.0))
        writer.add("lm_head.weight", torch.ones(3, 4, dtype=torch.bfloat16))
    write_config(folder, {"model_type": "x"}, FORMAT.config(quant, ["lm_head"]))
    return folder, weights


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
    assert detect({"quantization_config": FORMAT.config(QuantSpec(), [])}) is FORMAT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' is not read"),
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
    specs = {"a.exact": QuantSpec(8, -1), "b.gate_proj": QuantSpec(3, 16), "c.other": QuantSpec(4, 32, sym=False)}
    config = FORMAT.config(QuantSpec(), [])
    groups = {}
    for target, spec in zip(["a.exact", "re:.*gate_proj$", "Linear"], specs.values()):
        groups[target] = copy.deepcopy(FORMAT.config(spec, [])["config_groups"]["group_0"]) | {"targets": [target]}
    groups["re:.*gate_proj$"]["targets"].append("re:a.*")  # a.exact is matched by all three; its name must win
    config |= {"config_groups": dict(reversed(groups.items())), "format": "mixed-precision"}
    weights = {name: random_weight(5, 64, spec.bits, spec.group_size, spec.sym) for name, spec in specs.items()}
    with ShardWriter(tmp_path / "out") as writer:
        for name, weight in weights.items():
            for key, tensor in FORMAT.pack(name, weight, specs[name]).items():
                writer.add(key, tensor)
    write_config(tmp_path / "out", {}, config)
    checkpoint = open_checkpoint(tmp_path / "out")
    for name, weight in weights.items():
        assert checkpoint.describe(name).bits == weight.bits
        assert torch.equal(checkpoint.quantized(name).codes, weight.codes)
        assert torch.equal(checkpoint.quantized(name).zeros, weight.zeros)
    change_config(tmp_path / "out", config_groups={"g": groups["a.exact"]})
    with pytest.raises(CheckpointError, match="no target in quantization_config matches"):
        open_checkpoint(tmp_path / "out")


def padded(table: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes in words as compressed-tensors 0.17 wrote them: floor(32 / bits) codes to a word, lowest first."""
    lanes = 32 // bits
    words = [[0] * -(-table.shape[1] // lanes) for _ in table]
    for row, codes in enumerate(table.tolist()):
        for place, code in enumerate(codes):
            words[row][place // lanes] |= code << (bits * (place % lanes))
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)  # no code reaches bit 31, so nothing wraps


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("columns", [256, 192, 40])
def test_padded_words_of_old_versions_are_read(random_weight, columns, bits, sym):
    """Ten 3-bit codes to a word, as 0.17 wrote: mostly the width tells, and where it does not, the version does."""
    weight = random_weight(200, columns, bits, 8, sym)
    packed = FORMAT.pack("p", weight, QuantSpec(bits, 8, sym))
    packed["p.weight_packed"] = padded(weight.codes[0], bits)
    if not sym:
        packed["p.weight_zero_point"] = padded(weight.zeros[0].T, bits).T.contiguous()
    config = FORMAT.config(QuantSpec(bits, 8, sym), []) | {"version": "0.17.1"}
    read = FORMAT.unpack("p", config, packed.__getitem__)
    for field in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(read, field), getattr(weight, field)), field


def test_four_bits_never_changed(random_weight):
    four = random_weight(4, 40, 4, 8, True)
    config = FORMAT.config(QuantSpec(4, 8), []) | {"version": "0.9.0"}
    assert torch.equal(
        FORMAT.unpack("p", config, FORMAT.pack("p", four, QuantSpec(4, 8)).__getitem__).codes, four.codes
    )


def test_width_alone_tells_padded_from_dense_in_every_real_layer():
    """From 192 inputs on; below that the version has to decide."""
    for bits in (3, 5, 6, 7):
        for columns in range(192, 20_000):
            assert -(-columns // (32 // bits)) != -(-columns * bits // 32)
    assert scheme.is_padded(scheme.Scheme(3, 8, True, "0.17.2.a20260601"), 40, 4)
    assert not scheme.is_padded(scheme.Scheme(3, 8, True, "0.18.0"), 40, 4)
    assert not scheme.is_padded(scheme.Scheme(3, 8, True, None), 40, 4)
    assert scheme.is_padded(scheme.Scheme(3, 8, True, "0.20.0"), 256, 26)
    assert not scheme.is_padded(scheme.Scheme(3, 8, True, "0.17.1"), 256, 24)


# --- sets of tensors that are not whole ------------------------------------------------------------------------------


def rewrite(folder, change):
    """Writes the folder's tensors again after `change` has had its way with the dict of them."""
    with open_checkpoint(folder) as checkpoint:
        tensors = {name: checkpoint.raw_load(name) for name in checkpoint.raw_names()}
    change(tensors)
    for file in folder.glob("model*"):
        file.unlink()
    with ShardWriter(folder) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


P = "model.layers.0.mlp.experts.0.up_proj"


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"])
def test_a_part_that_is_missing(quantized_folder, part):
    folder, _ = quantized_folder
    rewrite(folder, lambda tensors: tensors.pop(f"{P}.{part}"))
    with pytest.raises(CheckpointError, match=rf"'{P}' is stored as .* where its config says .*{part}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("part", ["weight", "weight_g_idx"])
def test_a_part_too_many(quantized_folder, part):
    folder, _ = quantized_folder
    rewrite(folder, lambda tensors: tensors.update({f"{P}.{part}": torch.zeros(7, 72)}))
    with pytest.raises(CheckpointError, match=rf"'{P}' is stored as .*{part}.*, where its config says"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_shape", torch.tensor([72, 7]), "no groups of 24"),
        ("weight_shape", torch.tensor([8, 72]), r"needs \[8, 7\]"),
        ("weight_shape", torch.tensor([-7, 72]), "no groups"),
        ("weight_shape", torch.tensor([7, 1 << 60]), "no groups|needs"),
        ("weight_shape", torch.tensor([7, 72, 1]), r"int64 \[3\], where int64 \[2\]"),
        ("weight_shape", torch.tensor([7.0, 72.0]), r"float32 \[2\], where int64"),
        ("weight_packed", torch.zeros(7, 7, dtype=torch.int64), "int64"),
        ("weight_packed", torch.zeros(2, 7, 7, dtype=torch.int32), r"int32 \[2, 7, 7\]"),
        ("weight_scale", torch.ones(7, 3, dtype=torch.float64), "float64"),
        ("weight_scale", torch.ones(7, dtype=torch.bfloat16), r"bfloat16 \[7\]"),
        ("weight_zero_point", torch.zeros(7, 3, dtype=torch.int8), r"int8 \[7, 3\]"),
        ("weight_zero_point", torch.zeros(1, 3, dtype=torch.int8), "where int32"),
    ],
)
def test_parts_that_disagree(quantized_folder, part, value, message):
    folder, _ = quantized_folder
    rewrite(folder, lambda tensors: tensors.update({f"{P}.{part}": value}))
    for ask in (verify, lambda folder: open_checkpoint(folder).quantized(P)):
        with pytest.raises(CheckpointError, match=message) as caught:
            ask(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

"""MLX's affine format: what it holds without loss, what is refused with the number, and MLX itself as the oracle."""

from __future__ import annotations

import json

import pytest
import torch

from sarqc.checkpoint.formats import FORMATS, detect
from sarqc.checkpoint.formats.mlx import BITS, GROUPS
from sarqc.checkpoint.formats.stacked import experts_of, own_names, stack_of
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.config import QuantConfig
from sarqc.errors import CheckpointError
from sarqc.method.weight import QuantizedWeight

MLX = FORMATS["mlx"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_a_round_trip_keeps_every_bit(random_weight, bits, group_size, sym, dtype):
    weight, quant = random_weight(24, 256, bits, group_size, sym, dtype), QuantConfig(bits, group_size, sym)
    tensors = MLX.pack("p", weight, quant)
    assert tensors["p.biases"].dtype == (dtype if sym else torch.float32)
    config = MLX.config(quant, [])
    assert detect({"quantization_config": config}) is MLX
    info = MLX.describe("p", config, tensors.__getitem__, tensors.__getitem__)
    assert (info.shape, info.bits, info.groups, info.dtype) == ((24, 256), bits, 256 // group_size, dtype)
    back = MLX.unpack("p", config, tensors.__getitem__)
    for part in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(back, part), getattr(weight, part)), part


@pytest.mark.parametrize("bits", BITS)
def test_mlx_expands_the_words_to_the_same_weights(random_weight, bits):
    mx = pytest.importorskip("mlx.core")
    weight = random_weight(24, 128, bits, 32, True, torch.float32)
    words, scales, biases = (mx.array(one.numpy()) for one in MLX.pack("p", weight, QuantConfig(bits, 32)).values())
    with mx.stream(mx.cpu):
        theirs = torch.tensor(mx.dequantize(words, scales, biases, group_size=32, bits=bits).tolist())
    codes, scale = weight.codes[0].double(), weight.scales[0].double().repeat_interleave(32, 1)
    exact = codes * scale - scale * (1 << (bits - 1))
    assert (theirs.double() - exact).abs().max() <= 2**-23 * (codes * scale).abs().max()  # two roundings in fp32


def test_what_is_not_exact_is_refused_with_the_number(random_weight):
    weight = random_weight(8, 64, 8, 32, True, torch.float16)
    weight.scales[0, 0, 0] = weight.scales[0, 3, 1] = 600.0
    with pytest.raises(CheckpointError, match="'p' has 2 of 16 groups whose zero times scale is no number of float16"):
        MLX.pack("p", weight, QuantConfig(8, 32))
    wide = random_weight(8, 64, 8, 32, False, torch.float32)
    with pytest.raises(CheckpointError, match="of 16 groups whose zero times scale is no number of float32"):
        MLX.pack("p", wide, QuantConfig(8, 32, sym=False))
    tensors = MLX.pack("p", random_weight(8, 64, 4, 32, True), QuantConfig(4, 32))
    tensors["p.biases"][2, 1] *= 1.3
    tensors["p.biases"][5, 0] = 0.3
    with pytest.raises(CheckpointError, match="'p' has 2 of 16 groups whose bias is not minus an integer zero"):
        MLX.unpack("p", MLX.config(QuantConfig(4, 32), []), tensors.__getitem__)


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        (QuantConfig(7, 32), "bits = 7 cannot be held by mlx"),
        (QuantConfig(4, 16), "group_size = 16 cannot be held by mlx"),
        (QuantConfig(4, -1), "group_size = -1 cannot be held by mlx"),
        (QuantConfig(group_size=32, avg_bits=5.0, bit_options=(4, 7)), "bits = 7 cannot be held by mlx"),
    ],
)
def test_what_mlx_has_no_kernels_for_is_refused(quant, message):
    with pytest.raises(CheckpointError, match=message):
        MLX.check(quant)


def test_layers_that_mlx_lm_rounds_again_and_convolutions_are_refused():
    with pytest.raises(CheckpointError, match="ignore = 'kv_b_proj"):
        MLX.check_layer("model.layers.0.self_attn.kv_b_proj", (64, 64), QuantConfig(4, 32))
    with pytest.raises(CheckpointError, match=r"'conv1d.weight' has shape \[8, 1, 4\]"):
        MLX.check_dense("conv1d.weight", (8, 1, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "mxfp4"}, "mode 'mxfp4' are not read"),
        ({"bits": "4"}, "bits '4', group_size 32 are not read"),
        ({"group_size": 48}, "bits 4, group_size 48 are not read"),
    ],
)
def test_configs_that_are_not_understood_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        MLX.linears(["p.weight", "p.scales", "p.biases"], MLX.config(QuantConfig(4, 32), []) | change)


def test_tensors_that_do_not_fit_each_other_are_refused(random_weight):
    config, tensors = (
        MLX.config(QuantConfig(4, 32), []),
        MLX.pack("p", random_weight(8, 64, 4, 32, True), QuantConfig(4, 32)),
    )
    with pytest.raises(CheckpointError, match="'p' has no biases"):
        MLX.linears(["p.weight", "p.scales"], config)
    for part, wrong in (("weight", tensors["p.weight"].view(torch.int32)), ("scales", tensors["p.scales"][:, :1])):
        changed = tensors | {f"p.{part}": wrong}
        with pytest.raises(CheckpointError, match=f"{part} of 'p' is"):
            MLX.unpack("p", config, changed.__getitem__)


def test_a_stack_without_bytes_is_refused_whatever_its_size(tmp_path):
    """Its header alone would stand for a name for each of its experts."""
    names = [f"m.switch_mlp.up_proj.{part}" for part in ("biases", "scales", "weight")]
    header = {name: {"dtype": "U32", "shape": [1 << 40, 0], "data_offsets": [0, 0]} for name in names}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4, "group_size": 32}}))
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=r"'m\.switch_mlp\.up_proj'"):
        checkpoint.storage()


def test_a_scale_of_zero_means_a_weight_of_zero():
    scales, zeros = torch.zeros(1, 4, 2, dtype=torch.bfloat16), torch.full((1, 4, 2), 8, dtype=torch.uint8)
    weight = QuantizedWeight(torch.full((1, 4, 64), 3, dtype=torch.uint8), scales, zeros, 4)
    tensors = MLX.pack("p", weight, QuantConfig(4, 32))
    assert torch.equal(MLX.unpack("p", MLX.config(QuantConfig(4, 32), []), tensors.__getitem__).zeros, zeros)


def test_experts_have_names_of_their_own_in_stacks():
    one = "model.layers.3.block_sparse_moe.experts.11.w3"
    assert stack_of(one) == ("model.layers.3.block_sparse_moe.switch_mlp.up_proj", 11)
    assert stack_of(f"{one}.scales") == ("model.layers.3.block_sparse_moe.switch_mlp.up_proj.scales", 11)
    assert stack_of("model.layers.3.mlp.shared_experts.up_proj") is None
    stack = "model.layers.3.block_sparse_moe.switch_mlp.up_proj.scales"
    assert experts_of(stack, 12, {"expert_names": own_names([one])})[11] == f"{one}.scales"
    assert experts_of(stack, 1, {}) == ["model.layers.3.block_sparse_moe.experts.0.up_proj.scales"]
    assert experts_of("model.norm.weight", 4, {}) == [] and own_names(["a.experts.0.up_proj"]) is None

"""The servers' rules, one by one, and whole models against what is known of them."""

from __future__ import annotations

import pytest

from sarqc.config import QuantConfig
from sarqc.conventions import star
from sarqc.serving.rules import SERVERS, Layer, RuntimeModel, fused_layers, mixed_places, runtime_support

AMPERE, HOPPER, SGLANG = "vLLM 0.33, sm_80", "vLLM 0.33, sm_90", "SGLang 0.5.23"
TRANSFORMERS = "transformers 5.23"


def layer(out=4096, inputs=4096, name="o_proj", stacked=False):
    (one,) = fused_layers([(f"model.layers.0.x.{name}", (out, inputs), stacked)], None)
    return one


def kernel(server, one, ranks=1, **quant):
    shape = one.on(ranks)
    assert not isinstance(shape, str)
    return SERVERS[server](one, *shape, QuantConfig(**{"group_size": 128} | quant))[0]


@pytest.mark.parametrize(
    ("server", "quant", "expected"),
    [
        (AMPERE, {}, "Marlin"),
        (AMPERE, {"sym": False}, "Marlin"),
        (AMPERE, {"bits": 8}, "Marlin"),
        (AMPERE, {"bits": 8, "sym": False}, "Humming"),
        (AMPERE, {"bits": 3}, "Humming"),
        (AMPERE, {"group_size": 256}, "Humming"),
        (AMPERE, {"group_size": -1}, "Marlin"),
        (HOPPER, {}, "Machete"),
        (HOPPER, {"group_size": 32}, "Humming"),
        (HOPPER, {"bits": 3}, "Humming"),
        (SGLANG, {}, "Marlin"),
        (SGLANG, {"bits": 3}, None),
        (SGLANG, {"bits": 8, "sym": False}, None),
        (TRANSFORMERS, {"bits": 3}, "expanded on loading"),
        (TRANSFORMERS, {"sym": False}, None),
    ],
)
def test_dense_layers_by_number_format(server, quant, expected):
    assert kernel(server, layer(), **quant) == expected


@pytest.mark.parametrize(
    ("one", "quant", "expected"),
    [
        (layer(4096, 1536, "down_proj", True), {}, "Marlin MoE"),
        (layer(4096, 1536, "down_proj", True), {"bits": 3}, "Humming MoE"),
        (layer(4096, 1536, "down_proj", True), {"bits": 3, "group_size": -1}, None),  # group strategy only
        (layer(4096, 1536, "down_proj", True), {"group_size": -1}, "Marlin MoE"),
        (layer(2880, 2880, "down_proj", True), {"group_size": 32}, "Humming MoE"),  # hidden size % 128
        (layer(64, 40, "down_proj", True), {"bits": 3, "group_size": 8}, None),  # 120 bits are no whole words
    ],
)
def test_experts(one, quant, expected):
    assert kernel(AMPERE, one, **quant) == expected


def test_machete_wants_multiples_of_64_inputs_and_128_outputs():
    assert kernel(HOPPER, layer(128, 64, "up_proj"), group_size=64) == "Machete"
    assert kernel(HOPPER, layer(192, 64, "up_proj"), group_size=64) == "Humming"


def test_ranks_split_inputs_of_some_layers_and_outputs_of_others():
    assert layer(4096, 2048, "down_proj").on(4) == (4096, 512)
    assert layer(4096, 2048, "up_proj").on(4) == (1024, 2048)
    assert layer(576, 7168, "kv_a_proj_with_mqa").on(8) == (576, 7168)
    assert "3 ranks" in layer(4096, 2048, "down_proj").on(3)


def test_key_value_heads_are_repeated_rather_than_split():
    names = [(f"a.{name}", (rows, 64), False) for name, rows in (("q_proj", 256), ("k_proj", 32), ("v_proj", 32))]
    (qkv,) = fused_layers(names, 2)
    assert qkv.name == "a.q_proj+k_proj+v_proj" and qkv.outputs == (256, 32, 32)
    assert qkv.on(2) == (128 + 16 + 16, 64) and qkv.on(8) == (32 + 16 + 16, 64)


def test_a_group_that_a_rank_cannot_hold_is_named():
    """Qwen3-235B-A22B: 1536 inputs of each expert's down_proj, in groups of 128, over 8 ranks."""
    linears = [(f"model.layers.{i}.mlp.experts.0.down_proj", (4096, 1536), True) for i in range(2)]
    runtime_model = RuntimeModel(fused_layers(linears, 4), (), (), 64, 4)
    by_name = {
        (one.server, one.ranks): one
        for one in runtime_support(runtime_model, QuantConfig(group_size=128), "compressed-tensors")
    }
    assert by_name[AMPERE, 4].failures == () and by_name[AMPERE, 4].kernels == {"Marlin MoE": 2}
    reason = "192 inputs on each rank are no multiple of the group size 128"
    assert by_name[AMPERE, 8].failures == (f"model.layers.*.mlp.experts.*.down_proj: {reason}",)
    assert runtime_support(runtime_model, QuantConfig(group_size=64), "compressed-tensors", (8,))[0].failures == ()


def test_heads_and_mixed_layers_fail_whatever_the_kernel():
    runtime_model = RuntimeModel(
        (Layer("a", (64,), 64, "outputs", False, count=1),), ("b.gate_proj+up_proj",), (), 6, 4
    )
    by_ranks = {
        one.ranks: one.failures
        for one in runtime_support(runtime_model, QuantConfig(group_size=32), "compressed-tensors")[:4]
    }
    assert by_ranks[1] == ("b.gate_proj+up_proj: only a part of what is fused here is quantized",)
    assert "6 attention heads cannot be split over 4 ranks" in by_ranks[4]
    assert mixed_places(["m.0.q_proj", "m.1.q_proj"], ["m.0.k_proj", "lm_head"]) == ("m.*.q_proj+k_proj+v_proj",)


def test_an_unknown_format_is_not_known():
    assert not any(
        one.known for one in runtime_support(RuntimeModel((), (), (), None, None), QuantConfig(group_size=128), "other")
    )


def test_numbers_become_stars():
    assert star("model.layers.10.mlp.experts.3.w1") == "model.layers.*.mlp.experts.*.w1"
    assert star("layer1.w2") == "layer1.w2"


@pytest.mark.parametrize(
    ("server", "rows", "quant", "expected"),
    [
        (AMPERE, 32000, {}, "Marlin"),
        (AMPERE, 50257, {}, "Marlin"),  # filled up to 50304
        (HOPPER, 50257, {}, "Machete"),
        (SGLANG, 32000, {}, "Marlin"),
        (SGLANG, 32000, {"bits": 3}, None),
        (AMPERE, 50257, {"sym": False}, None),  # zeros of the file are counted before it is filled up
        (TRANSFORMERS, 50257, {}, "expanded on loading"),
    ],
)
def test_a_head_is_filled_up_and_named(server, rows, quant, expected):
    (head,) = fused_layers([("lm_head", (rows, 4096), False)], None, {"lm_head"})
    assert head.name == "lm_head" and head.on(8) == (-(-rows // 64) * 8, 4096)
    model = RuntimeModel((head,), (), (), None, None)
    (support,) = runtime_support_of(server, model, QuantConfig(**{"group_size": 128} | quant))
    assert support.kernels == ({expected: 1} if expected else {}) and bool(support.failures) == (expected is None)


def runtime_support_of(server, model, quant):
    return [one for one in runtime_support(model, quant, "compressed-tensors", [1]) if one.server == server]

"""`convert`: every format into every other and back, codes, scales and zeros compared, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import ChainMap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sarqc
from sarqc.checkpoint import assemble
from sarqc.checkpoint import convert as conversion
from sarqc.checkpoint.convert import ignored, spec_of
from sarqc.checkpoint.formats import FORMATS
from sarqc.checkpoint.manifest import read_manifest
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.checkpoint.side_files import write_config
from sarqc.config import QuantConfig
from sarqc.entrypoints.convert import convert
from sarqc.errors import ArgumentError, CheckpointError
from tests.support import tiny
from tests.support.checkpoints import differences, write_weights


def quantize(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **how: object) -> Path:
    source = tiny.save(kind, folder / f"{kind}-source", dtype=dtype)
    return sarqc.quantize(source, folder / "quantized", method="rtn", group_size=32, **how).out


@pytest.fixture(scope="module")
def symmetric(tmp_path_factory) -> Path:
    return quantize("qwen3_moe", tmp_path_factory.mktemp("sym"))


@pytest.fixture(scope="module")
def asymmetric(tmp_path_factory) -> Path:
    return quantize("llama", tmp_path_factory.mktemp("asym"), sym=False)


def files(folder: Path) -> dict[str, bytes]:
    """What a checkpoint is; the report and what is made of it hold times."""
    names = ("report.json", "report.html", "README.md")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in names}


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "awq"])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_there_and_back_gives_the_same_bytes(request, tmp_path, kind, format):
    source = request.getfixturevalue(kind)
    seen: list[tuple[int, int, str]] = []
    there = convert(source, tmp_path / "there", format=format, progress=lambda *step: seen.append(step))
    back = convert(there.out, tmp_path / "back", format="compressed-tensors")
    assert files(back.out) == files(source)
    with open_checkpoint(source) as first, open_checkpoint(there.out) as second:
        assert second.format is not None and second.format.name == there.record["format"]
        assert second.format.name == ("gptq_v2" if format == "gptq" and kind == "asymmetric" else format)
        assert list(differences(second, first)) == []
        assert [name for _, _, name in seen] == first.names() and seen[-1][0] == seen[-1][1]
        assert second.config["quantization_config"] != first.config["quantization_config"]
    report = json.loads((there.out / "report.json").read_text())
    assert report["converted"]["from"] == "compressed-tensors" and report["quant"]["bits"] == 4
    again = convert(source, tmp_path / "again", format=format)
    assert files(again.out) == files(there.out)


def test_shards_hold_the_bytes_of_one_file(symmetric, tmp_path, monkeypatch):
    """A conversion that is too large for one file, and for memory: what is converted is written as it comes."""
    whole = convert(symmetric, tmp_path / "whole", format="gptq").out
    for module in (conversion, assemble):
        monkeypatch.setattr(module, "MERGE_BYTES", 50_000)
    several = convert(symmetric, tmp_path / "several", format="gptq").out
    assert len(list(several.glob("model-*.safetensors"))) > 2 and not list(several.glob(".*"))
    with open_checkpoint(whole) as one, open_checkpoint(several) as other:
        assert one.raw_names() == other.raw_names()
        assert all(torch.equal(one.raw_load(name), other.raw_load(name)) for name in one.raw_names())


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_it_runs_and_says_the_same(symmetric, tmp_path, format):
    out = convert(symmetric, tmp_path / "out", format=format).out
    tokens = torch.arange(24).reshape(1, 24)
    for packed in (False, True):
        values = [sarqc.load(folder, packed=packed)[0](tokens).logits for folder in (symmetric, out)]
        assert torch.equal(*values)


def test_quantize_writes_the_format_itself(tmp_path, symmetric):
    for format in ("gptq", "gptq_v2", "awq"):
        direct = sarqc.quantize(
            symmetric.parent / "qwen3_moe-source", tmp_path / format, method="rtn", group_size=32, format=format
        ).out
        there = convert(symmetric, tmp_path / f"{format}-2", format=format).out
        direct_files, there_files = files(direct), files(there)
        assert direct_files.keys() == there_files.keys()
        for name in direct_files.keys() - {"config.json", "quantize_config.json"}:
            assert direct_files[name] == there_files[name], name
        # the model knows its routers, the converter sees matrices: the same layers, maybe in another order
        first, second = (json.loads(result["config.json"]) for result in (direct_files, there_files))
        known = FORMATS[format]
        assert set(known.ignored(first["quantization_config"])) == set(known.ignored(second["quantization_config"]))


def test_quantize_and_convert_name_alike_what_transformers_has_no_use_for(tmp_path):
    """Layers that servers draft tokens with: whoever takes every Linear for packed must be told that these are not."""
    source = tiny.save("deepseek_v3", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    extra = {
        name.replace(".layers.1.", ".layers.2."): one.clone() for name, one in tensors.items() if ".layers.1." in name
    }
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    kinds = sarqc.estimate(source, tmp_path / "out", method="rtn", group_size=32).kinds
    assert all(kind.left != "router or no Linear" or kind.name.endswith("mlp.gate") for kind in kinds)
    out = sarqc.quantize(source, tmp_path / "out", method="rtn", group_size=32).out
    with open_checkpoint(out) as written:
        named = set(written.config["quantization_config"]["ignore"])
        assert named == set(ignored(written))
    more = {name.removesuffix(".weight") for name, one in extra.items() if one.dim() == 2}
    assert len(more) > 10 and {name for name in named if ".layers.2." in name} == more


def test_three_bits_in_old_padded_words_become_dense(tmp_path):
    from tests.checkpoint.test_padded_words import padded

    new = quantize("llama", tmp_path, bits=3)
    old = tmp_path / "old"
    with open_checkpoint(new) as checkpoint:
        tensors = {name: checkpoint.raw_load(name) for name in checkpoint.raw_names()}
        for name in tensors:
            linear, _, part = name.rpartition(".")
            if part == "weight_packed":
                tensors[name] = padded(checkpoint.quantized(linear).codes[0], 3)
        write_weights(old, tensors)
        quantization = checkpoint.config["quantization_config"] | {"version": "0.17.1"}
        write_config(old, checkpoint.config, checkpoint.format, quantization)
    out = convert(old, tmp_path / "out", format="compressed-tensors").out
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (new / name).read_bytes()
    assert read_manifest(out) == read_manifest(new)
    assert (old / "model.safetensors").read_bytes() != (new / "model.safetensors").read_bytes()
    gptq = convert(old, tmp_path / "gptq", format="gptq").out
    with open_checkpoint(gptq) as theirs, open_checkpoint(new) as ours:
        assert list(differences(theirs, ours)) == []


def write(
    folder: Path, weights: dict[str, tuple[object, QuantConfig]], groups: dict[str, object] | None = None
) -> Path:
    """A compressed-tensors folder of these weights, each a target of its own where `groups` are given."""
    format = FORMATS["compressed-tensors"]
    write_weights(folder, dict(ChainMap(*(format.pack(name, *one) for name, one in weights.items()))))
    config = format.config(next(iter(weights.values()))[1], [])
    if len(weights) > 1:
        config["config_groups"] = {
            name: format.config(quant, [])["config_groups"]["group_0"] | {"targets": [name]}
            for name, (_, quant) in weights.items()
        }
    write_config(folder, {"model_type": "llama"}, format, config)
    return folder


@pytest.mark.parametrize(
    ("shape", "quant", "dtype", "format", "message"),
    [
        ((32, 64), QuantConfig(5, 32), torch.bfloat16, "gptq", "bits = 5 cannot be held by gptq"),
        ((32, 64), QuantConfig(3, 32), torch.bfloat16, "awq", "bits = 3 cannot be held by awq"),
        ((36, 64), QuantConfig(4, 32), torch.bfloat16, "gptq", "'p' has 36 outputs"),
        ((32, 72), QuantConfig(3, 24), torch.bfloat16, "gptq", "'p' has 72 inputs"),
        ((36, 64), QuantConfig(4, 32), torch.bfloat16, "awq", "'p' has 36 outputs"),
        ((32, 64), QuantConfig(4, 32), torch.float32, "gptq", "scales of float32"),
        ((32, 64), QuantConfig(4, 32), torch.float32, "awq", "scales of float32"),
        ((32, 64), QuantConfig(4, 32), torch.bfloat16, "gguf", "format = 'gguf' is not known: use compressed-tensors"),
    ],
)
def test_what_the_target_cannot_hold_is_refused_and_nothing_written(
    tmp_path, random_weight, shape, quant, dtype, format, message
):
    source = write(tmp_path / "in", {"p": (random_weight(*shape, quant.bits, quant.group_size, True, dtype), quant)})
    with pytest.raises((CheckpointError, ArgumentError), match=message):
        convert(source, tmp_path / "out", format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_layers_of_different_groups_are_refused(tmp_path, random_weight):
    specs = {"a": QuantConfig(4, 32), "b": QuantConfig(4, 64)}
    weights = {name: (random_weight(32, 64, 4, quant.group_size, True), quant) for name, quant in specs.items()}
    source = write(tmp_path / "in", weights)
    with pytest.raises(CheckpointError, match="'b' has groups of 64, 'a' has groups of 32: only"):
        convert(source, tmp_path / "out", format="compressed-tensors")


def test_layers_of_different_widths_keep_them_and_fit_no_other_format(tmp_path, random_weight):
    specs = {"a": QuantConfig(4, 32), "b": QuantConfig(8, 32), "c": QuantConfig(4, 32)}
    weights = {name: (random_weight(32, 64, quant.bits, 32, True), quant) for name, quant in specs.items()}
    source = write(tmp_path / "in", weights)
    out = convert(source, tmp_path / "out", format="compressed-tensors").out
    with open_checkpoint(source) as before, open_checkpoint(out) as after:
        assert list(differences(after, before)) == []
        assert {linear: after.describe(linear).bits for linear in after.linears()} == {"a": 4, "b": 8, "c": 4}
        groups = after.config["quantization_config"]["config_groups"].values()
        assert [(group["weights"]["num_bits"], group["targets"]) for group in groups] == [(8, ["b"]), (4, ["a", "c"])]
    for format in ("gptq", "gptq_v2", "awq"):
        with pytest.raises(CheckpointError, match=f"cannot be held by {format}: its config has one width"):
            convert(source, tmp_path / "other", format=format)


def test_zeros_that_are_all_in_the_middle_make_it_symmetric(tmp_path, random_weight):
    weight = random_weight(32, 64, 4, 32, True)
    source = write(tmp_path / "in", {"p": (weight, QuantConfig(4, 32, sym=False))})
    assert convert(source, tmp_path / "out", format="gptq").record["format"] == "gptq"
    channel = write(tmp_path / "row", {"p": (random_weight(32, 64, 4, -1, False), QuantConfig(4, -1, sym=False))})
    converted = convert(channel, tmp_path / "row-out", format="awq").record
    assert converted["quant"] == {"bits": 4, "group_size": -1, "sym": False}


def test_bad_places_are_refused(tmp_path, symmetric):
    with pytest.raises(CheckpointError, match="is not quantized"):
        convert(symmetric.parent / "qwen3_moe-source", tmp_path / "out", format="gptq")
    with pytest.raises(CheckpointError, match="own folder"):
        convert(symmetric, symmetric / "inside", format="gptq")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        convert(symmetric, tmp_path / "full", format="gptq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_slip_on_the_way_is_seen_and_nothing_stays(tmp_path, symmetric, monkeypatch):
    """A packer that loses one bit of one weight: the last look compares every code with the source's."""
    pack = type(FORMATS["gptq"]).pack

    def slip(self, linear, weight, quant):
        packed = pack(self, linear, weight, quant)
        if linear.endswith("layers.1.self_attn.o_proj"):
            packed[f"{linear}.qweight"][3, 5] ^= 1 << 17
        return packed

    monkeypatch.setattr(type(FORMATS["gptq"]), "pack", slip)
    with pytest.raises(CheckpointError, match=r"codes of 'model.layers.1.self_attn.o_proj.weight' are not those in"):
        convert(symmetric, tmp_path / "out", format="gptq")
    assert list(tmp_path.iterdir()) == []


def test_spec_of_reads_no_further_than_it_must(asymmetric):
    with open_checkpoint(asymmetric) as checkpoint:
        asked: list[str] = []
        unpack = checkpoint.unpack
        checkpoint.unpack = lambda linear, load: (asked.append(linear), unpack(linear, load))[1]
        assert not spec_of(checkpoint)[0].sym and len(asked) == 1


@pytest.mark.parametrize("changes", [None, {"blocks": [5]}, {"size": []}], ids=["no JSON", "blocks", "size"])
def test_a_report_that_cannot_be_shown_is_left_out(symmetric, tmp_path, changes):
    copy = tmp_path / "copy"
    shutil.copytree(symmetric, copy)
    report = json.loads((copy / "report.json").read_text())
    (copy / "report.json").write_text("{" if changes is None else json.dumps(report | changes))
    out = convert(copy, tmp_path / "out", format="gptq").out
    assert files(out) == files(convert(symmetric, tmp_path / "other", format="gptq").out)
    assert not (out / "report.json").exists() and not (out / "report.html").exists()

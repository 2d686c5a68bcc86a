"""`verify`: a sound checkpoint is sound, and whatever is changed in one is found and named."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sarqc
from sarqc.checkpoint import file_sums
from sarqc.checkpoint.files import read_json
from sarqc.checkpoint.manifest import MANIFEST
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.checkpoint.shards import Shard
from sarqc.entrypoints.verify import verify
from sarqc.errors import CheckpointError, ModelError
from sarqc.pipeline import verify as job
from tests.support import tiny

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    return sarqc.quantize(source, tmp_path_factory.mktemp("out") / "out", method="rtn", group_size=32).out


@pytest.fixture
def out(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_groups_that_no_server_has_rules_for_are_sound(out):
    """Of another tool: smaller ones than are written here."""
    (out / MANIFEST).unlink()
    scales = lambda t: {name: part.repeat_interleave(8, -1) for name, part in t.items() if name.endswith("_scale")}  # noqa: E731
    change_tensors(out, lambda tensors: tensors.update(scales(tensors)))
    group = lambda config: config["quantization_config"]["config_groups"]["group_0"]["weights"]  # noqa: E731
    change_json(out / "config.json", lambda config: group(config).update(group_size=4))
    verified = verify(out)
    assert verified.problems == [] and verified.serve == []


def test_a_sound_checkpoint(whole, source):
    steps: list[tuple[int, int, str]] = []
    verified = verify(whole, against=source, progress=lambda *step: steps.append(step))
    assert verified.sound and verified.problems == [] and verified.manifest
    verified.require()
    assert steps[-1][0] == steps[-1][1] == len(steps)
    record = verified.record()
    assert record["sound"] and record["format"] == "compressed-tensors" and record["quantized_linears"] == 14
    assert 0.05 < record["weight_error"] < 0.2 and len(record["weight_errors"]) == 14
    assert record["weight_errors"] == json.loads((whole / "report.json").read_text())["weight_errors"]
    json.dumps(record, allow_nan=False)
    assert verify(whole).errors == {}


def test_every_byte_is_read_once(whole, source, monkeypatch):
    """But for the 16 bytes of a Linear's shape, which say what it is before it is read."""
    result, read = Counter(), Shard._read

    def counted(self, name, begin, count):
        result[self.path.parent, name.endswith("weight_shape")] += count
        return read(self, name, begin, count)

    monkeypatch.setattr(Shard, "_read", counted)
    assert verify(whole, against=source).sound
    for folder in (whole, source):
        with open_checkpoint(folder) as checkpoint:
            entries = [checkpoint.raw_entry(name) for name in checkpoint.raw_names() if "weight_shape" not in name]
        assert result[folder, False] == sum(entry.nbytes for entry in entries)


def test_the_error_is_that_of_the_definition(whole, source):
    theirs = load_file(source / "model.safetensors")[f"{UP}.weight"].double()
    with open_checkpoint(whole) as checkpoint:
        ours = checkpoint.quantized(UP).dequantize()[0].double()
    error = verify(whole, against=source).errors[f"{UP}.weight"]
    assert error == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-6)  # rows are summed in fp32


@pytest.mark.fault("a flipped bit in a tensor")
def test_any_flipped_bit_is_found_and_its_tensor_named(out, outcomes):
    """Single bits at 100 random places of the data, a hundredth of them in each part of it; one flip at a time."""
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    ends = {fields["data_offsets"][1]: name for name, fields in header.items() if name != "__metadata__"}
    draw, begin = random.Random(0), 8 + length
    size = len(data) - begin
    for part in range(100):
        place = begin + size * part // 100 + draw.randrange(size // 100)
        bit = 1 << draw.randrange(8)
        data[place] ^= bit
        file.write_bytes(data)
        name = ends[min(end for end in ends if end > place - begin)]
        with open_checkpoint(out) as checkpoint:
            result = list(job.files.problems(checkpoint))
        lines = [line for line in result if f"tensor {name!r} has changed since it was written" in line]
        assert lines, (place, result)
        outcomes.clear_error(lines[0])
        data[place] ^= bit
    file.write_bytes(data)
    assert verify(out).sound


@pytest.mark.fault("a flipped bit in a header")
def test_a_flipped_bit_in_the_header_is_found(out, outcomes):
    """In every seventh byte of it; only the word "pt" of the metadata may change unseen, and the blanks at its end."""
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    text = bytes(data[8 : 8 + length])
    metadata = range(8 + text.index(b"__metadata__"), 8 + text.index(b"}") + 1)
    for place in range(0, 8 + len(text.rstrip()), 7):
        if place in metadata:
            continue
        bit = 1 << (place % 8)
        data[place] ^= bit
        file.write_bytes(data)
        try:
            with open_checkpoint(out) as checkpoint:
                result = list(job.files.problems(checkpoint))
        except CheckpointError as error:
            result = [str(error)]
        assert result and all(str(out) in line for line in result), (place, result)
        outcomes.clear_error(result[0])
        data[place] ^= bit


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{UP}.weight_scale"][3, 1] = float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.weight_shape"), "is stored as"),
        (lambda t: [t.pop(f"{UP}.weight_{part}") for part in ("packed", "scale", "shape")], f"lacks tensor '{UP}."),
        (lambda t: t.pop("model.norm.weight"), "lacks tensor 'model.norm.weight', which sarqc-manifest.json lists"),
        (lambda t: t.update(extra=torch.ones(2)), "holds tensor 'extra', which sarqc-manifest.json does not list"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64)}), "is F32 [64], where BF16 [64] was written"),
        (poison, f"tensor '{UP}.weight_scale' has 1 numbers that are not finite"),
    ],
    ids=["part", "linear", "norm", "extra", "dtype", "infinity"],
)
@pytest.mark.fault("a missing, doubled or changed tensor")
def test_what_is_changed_is_named(out, outcomes, change, message):
    change_tensors(out, change)
    verified = verify(out)
    assert not verified.sound and any(message in line for line in verified.problems), verified.problems
    with pytest.raises(CheckpointError) as caught:
        verified.require()
    outcomes.clear_error(caught.value)


def test_all_problems_are_told_not_the_first(out):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        poison(tensors)
        tensors["model.norm.weight"] += 1

    change_tensors(out, change)
    verified = verify(out)
    assert len(verified.problems) == 3 and "model.norm.weight" in " ".join(verified.problems)
    with pytest.raises(CheckpointError, match=r"\(and 2 more\)"):
        verified.require()


@pytest.mark.fault("a weight of the model that is in no file")
def test_every_weight_of_the_model_must_be_there(out, outcomes):
    """Without a manifest only the model itself can tell."""
    (out / MANIFEST).unlink()
    assert verify(out).sound and not verify(out).manifest
    change_json(out / "config.json", lambda config: config.update(num_hidden_layers=3))
    verified = verify(out)
    assert "is no whole model" in verified.problems[0] and "model.layers.2" in verified.problems[0]
    outcomes.clear_error(verified.problems[0])


def test_against_another_model(out, source, tmp_path):
    other = tiny.save("llama", tmp_path / "other", seed=1)
    verified = verify(out, against=other)
    assert not verified.sound and any(f"'{UP}.weight' is 1.4" in line for line in verified.problems), verified.problems
    assert any("tensor 'model.embed_tokens.weight' is not the one in" in line for line in verified.problems)
    smaller = tiny.save("llama", tmp_path / "smaller", intermediate_size=64)
    assert any("is [128, 64], where" in line for line in verify(out, against=smaller).problems)
    with pytest.raises(ModelError):
        verify(out, against="no/such/model")


def test_the_record_of_the_run_is_held(out, source):
    name = f"{UP}.weight"

    def change(report: dict[str, object]) -> None:
        report["weight_errors"][name] *= 1.001

    change_json(out / "report.json", change)
    [problem] = verify(out, against=source).problems
    assert f"'{name}' has an error of" in problem and "where the run recorded" in problem
    change_json(out / "report.json", lambda report: report.update(rescaled=[name]))
    verified = verify(out, against=source)
    assert verified.sound and name not in verified.errors
    (out / "report.json").unlink()
    assert verify(out, against=source).sound


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 1, "algorithm": "sha256", "tensors": {"a": {}}}', "[" * 99999]
)
@pytest.mark.fault("a damaged manifest")
def test_a_damaged_manifest(out, outcomes, text):
    (out / MANIFEST).write_text(text)
    [problem] = verify(out).problems
    assert MANIFEST in problem
    outcomes.clear_error(problem)


def test_no_folder_is_an_error_of_the_caller(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        verify(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in verify(tmp_path / "empty").problems[0]


@pytest.mark.fault("a packer that writes something else")
def test_a_run_that_writes_something_else_ends_without_an_output(source, tmp_path, monkeypatch, outcomes):
    """The last look of a run is at the source's weights: a packer that swaps two groups cannot get past it."""
    from sarqc.checkpoint.formats import FORMATS

    kind = type(FORMATS["compressed-tensors"])
    pack = kind.pack

    def swap(self, linear, weight, quant):
        packed = pack(self, linear, weight, quant)
        return packed | {f"{linear}.weight_packed": packed[f"{linear}.weight_packed"].flip(1)}

    monkeypatch.setattr(kind, "pack", swap)
    with pytest.raises(CheckpointError, match="of its size away from the weight in") as caught:
        sarqc.quantize(source, tmp_path / "out", method="rtn", group_size=32)
    outcomes.clear_error(caught.value)
    assert not (tmp_path / "out").exists()  # what was solved is kept, in a hidden folder


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "config.json",
            lambda c: c.update(rope_theta=5.0, x={"y": 1}),
            "config.json has changed since it was written: ",
        ),
        ("config.json", lambda c: c.update(hidden_act="gelu"), 'hidden_act is "gelu", was "silu"'),
        ("config.json", lambda c: c.pop("rms_norm_eps"), "rms_norm_eps is missing, was 1e-06"),
        (
            "config.json",
            lambda c: c["quantization_config"].update(version="9"),
            'quantization_config.version is "9", was',
        ),
        ("tokenizer.json", lambda c: c["model"]["vocab"].update(new=511), "tokenizer.json has changed"),
        ("generation_config.json", lambda c: c.update(temperature=0.1), "temperature is 0.1, was missing"),
        ("generation_config.json", lambda c: None, "its values are the same, its layout is another"),
    ],
)
@pytest.mark.fault("a changed file beside the weights")
def test_a_changed_side_file_is_named_with_what_changed(out, outcomes, name, change, message):
    change_json(out / name, change)
    problems = verify(out).problems
    assert any(message in line and name in line for line in problems), problems
    outcomes.clear_error(problems[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("0", "1", 1), "has changed since it was written: other bytes"),
        (lambda text: text + "\n", "bytes, where"),
    ],
)
def test_a_changed_file_whose_values_are_too_many_to_record_is_named(source, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(file_sums, "_PARSED", 100)
    out = sarqc.quantize(source, tmp_path / "out", method="rtn", group_size=32).out
    assert "values" not in read_json(out / MANIFEST)["files"]["tokenizer.json"]
    path = out / "tokenizer.json"
    path.write_text(change(path.read_text()))
    (problem,) = verify(out).problems
    assert "tokenizer.json" in problem and message in problem


@pytest.mark.fault("a missing or added file beside the weights")
def test_a_missing_or_added_side_file_is_named(out, outcomes):
    (out / "tokenizer_config.json").unlink()
    (out / "chat_template.jinja").write_text("{{ messages }}")
    problems = verify(out).problems
    assert [line.removeprefix(f"{out} ").split(",")[0] for line in problems] == [
        "holds the file chat_template.jinja", "lacks the file tokenizer_config.json"
    ]  # fmt: skip
    outcomes.clear_error(problems[0])


def test_what_changes_after_a_run_is_no_problem(out):
    for name in ("report.json", "report.html", "README.md"):
        (out / name).write_text("edited" if name != "report.json" else "{}")
    assert verify(out).sound


def test_a_manifest_of_an_earlier_version_holds_tensors_alone(out, capsys, monkeypatch):
    from sarqc import cli

    change_json(out / MANIFEST, lambda manifest: manifest.pop("files"))
    change_json(out / "config.json", lambda config: config.update(hidden_act="gelu"))
    assert verify(out).sound and not verify(out).files
    monkeypatch.setattr("sys.argv", ["sarqc", "verify", str(out)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "of an earlier version, has no side files" in capsys.readouterr().out


@pytest.mark.fault("a config that takes a dense layer for quantized")
def test_a_dense_layer_that_the_config_takes_for_quantized_is_named(out, outcomes):
    """As other tools leave it: transformers would fill the head with random numbers."""
    (out / MANIFEST).unlink()
    change_json(out / "config.json", lambda config: config["quantization_config"].update(ignore=[]))
    [problem] = verify(out).problems
    assert "takes lm_head for quantized, which it is not: add it to ignore" in problem
    outcomes.clear_error(problem)
    for ignore in (["lm_head"], ["re:.*head"]):
        change_json(out / "config.json", lambda config: config["quantization_config"].update(ignore=ignore))  # noqa: B023
        assert verify(out).sound

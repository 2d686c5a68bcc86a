"""Situations that people reported against other tools, each with the outcome that a user would expect."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sarqc
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.entrypoints.estimate import estimate
from sarqc.entrypoints.verify import verify
from sarqc.pipeline.progress import NoProgress
from tests.support import tiny

SMALL = {"num_samples": 2, "seqlen": 32, "group_size": 32}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny.save(kind, folder / kind) for kind in ("llama", "qwen3_moe")}


@pytest.mark.parametrize(
    "pattern", [r"experts\.0\.", r"layers\.1\.mlp\.experts\.2\.up_proj", r"experts\.\d\.down_proj"]
)
def test_a_part_of_the_experts_of_a_layer_is_refused_by_every_runtime(sources, tmp_path, pattern):
    how = {"method": "rtn", "group_size": 32, "ignore": [pattern]}
    preflight = estimate(sources["qwen3_moe"], tmp_path / "out", **how)
    reason = "mlp.experts: all its experts must be quantized alike, or none"
    alone = [one for one in preflight.serve if one.known]
    assert alone and all(any(reason in line for line in one.failures) for one in alone)
    assert any("no server is known to load the result" in note for note in preflight.notes)
    result = sarqc.quantize(sources["qwen3_moe"], tmp_path / "out", **how)
    assert not any(result.report["serve"].values())
    assert all(one.failures for one in verify(result.out).serve if one.known)


def test_all_experts_of_a_layer_may_be_left(sources, tmp_path):
    preflight = estimate(
        sources["qwen3_moe"], tmp_path / "out", method="rtn", group_size=32, ignore=[r"layers\.0\.mlp"]
    )
    assert not any("all its experts" in line for one in preflight.serve for line in one.failures)


def test_the_run_says_that_no_server_fuses_what_is_left_in_part(sources, tmp_path):
    class Notes(NoProgress):
        notes: list[str] = []  # noqa: RUF012

        def note(self, text):
            self.notes.append(text)

    sarqc.quantize(sources["llama"], tmp_path / "out", method="rtn", ignore=["q_proj"], progress=Notes(), group_size=32)
    assert any("no server is known to load the result" in text and "q_proj+k_proj" in text for text in Notes.notes)


def test_an_adapter_beside_a_model_is_said_and_one_alone_refused(sources, tmp_path):
    model = shutil.copytree(sources["llama"], tmp_path / "model")
    (model / "adapter_config.json").write_text("{}")
    preflight = estimate(model, tmp_path / "out", **SMALL)
    assert any("adapter is left out" in note for note in preflight.notes)
    (model / "model.safetensors").unlink()
    with pytest.raises(sarqc.SarqcError, match="holds an adapter and no model: merge it"):
        sarqc.quantize(model, tmp_path / "out", **SMALL)


def test_offline_headers_come_from_what_was_fetched_before(sources, tmp_path, monkeypatch):
    """Also where the cache's blobs are a link to another disk; links elsewhere stay refused."""
    cache, revision = tmp_path / "hub", "0" * 40
    snapshot = cache / "models--some--model" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(revision)
    disk = tmp_path / "disk"
    disk.mkdir()
    (snapshot.parents[1] / "blobs").symlink_to(disk)
    for number, path in enumerate(sorted(sources["llama"].iterdir())):
        shutil.copy(path, disk / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    how = {"method": "rtn", "group_size": 32}
    preflight = estimate("some/model", tmp_path / "out", **how)
    assert preflight.sizes.output == sarqc.quantize("some/model", tmp_path / "out", **how).report["size"]["bytes"]
    with pytest.raises(sarqc.SarqcError, match=r"group_size = 48"):
        estimate("some/model", tmp_path / "other", **how | {"group_size": 48})
    (tmp_path / "elsewhere").write_bytes((disk / "0").read_bytes())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(sarqc.SarqcError, match="link out of its folder"):
        estimate("some/model", tmp_path / "other", **how)


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_float16_is_named_where_a_weight_is_beyond_it(tmp_path, scale):
    source = tiny.save("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = scale
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    how = SMALL | {"method": "gptq", "dtype": "float16"}
    if scale == 1:
        sarqc.quantize(source, tmp_path / "out", **how)
        return
    with pytest.raises(sarqc.SarqcError, match=r"'float16' does not hold model.layers.1.mlp.up_proj.weight.*9.98e\+04"):
        sarqc.quantize(source, tmp_path / "out", **how)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_float16_is_named_where_activations_are_beyond_it(tmp_path):
    source = tiny.save("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"] *= 3000
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(sarqc.SarqcError, match=r"float16 ends at 65504: use --dtype bfloat16 or float32"):
        sarqc.quantize(source, tmp_path / "out", **SMALL | {"method": "gptq", "dtype": "float16"})


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_scales_that_vanish_in_their_dtype_are_said(tmp_path, method):
    source = tiny.save("llama", tmp_path / "model", dtype=torch.float16)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:3] *= 1e-4
    tensors["model.layers.1.mlp.up_proj.weight"][5] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = sarqc.quantize(source, tmp_path / "out", **SMALL | {"method": method}).report
    [note] = [note for note in report["notes"] if "scale" in note]
    assert note.startswith("6 of 256 groups of model.layers.1.mlp.up_proj need a scale below 6.1e-05")


@pytest.mark.parametrize("how", [{}, {"avg_bits": 4.5}, {"method": "rtn"}, {"method": "awq"}])
def test_zero_weights_stay_zero(tmp_path, how):
    """As merged, pruned and expanded models have them."""
    source = tiny.save("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{name}.weight"].zero_()
    tensors["model.layers.0.mlp.down_proj.weight"][3] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = sarqc.quantize(source, tmp_path / "out", **SMALL | {"num_samples": 4} | how)
    with open_checkpoint(result.out) as written:
        assert not written.load("model.layers.1.mlp.down_proj.weight").any()
        assert not written.load("model.layers.1.self_attn.o_proj.weight").any()
        assert not written.load("model.layers.0.mlp.down_proj.weight")[3].any()
        assert written.load("model.layers.0.mlp.down_proj.weight")[4].any()


@pytest.mark.parametrize(
    ("kind", "changes", "how"),
    [
        ("llama", {"intermediate_size": 80}, {"group_size": 32}),
        ("llama", {"intermediate_size": 80}, {}),
        ("llama", {"intermediate_size": 136}, {"format": "gptq", "bits": 3, "group_size": 8}),
        ("qwen3_moe", {"moe_intermediate_size": 40}, {"group_size": 64}),
    ],
)
def test_the_pattern_in_an_error_leaves_all_layers_that_do_not_fit(tmp_path, kind, changes, how):
    """One answer for all of them: with it the run begins."""
    source = tiny.save(kind, tmp_path / "model", **changes)
    with pytest.raises(sarqc.SarqcError) as caught:
        estimate(source, tmp_path / "out", method="rtn", **how)
    pattern = re.search(r"--ignore '(.*)'", str(caught.value))[1]
    assert estimate(source, tmp_path / "out", method="rtn", ignore=[pattern], **how).quantized_linears > 0


@pytest.mark.parametrize(
    ("where", "how", "message"),
    [
        ("model/inside", {}, "is inside the model's own folder"),
        ("out", {"work_dir": "model/work"}, "work folder .* is inside the model's own folder"),
        ("out", {"work_dir": "out/work"}, "lie inside each other"),
        (
            "out",
            {"dataset": torch.zeros(2, 300, dtype=torch.int64)},
            "sequence length = 300 is more than the 256 positions",
        ),
    ],
)
def test_what_a_run_refuses_a_dry_run_refuses(tmp_path, where, how, message):
    source = tiny.save("llama", tmp_path / "model")
    how = {"method": "gptq", "group_size": 32} | how
    if "work_dir" in how:
        how["work_dir"] = tmp_path / how["work_dir"]
    for ask in (estimate, sarqc.quantize):
        with pytest.raises(sarqc.SarqcError, match=message):
            ask(source, tmp_path / where, **how)


def test_a_layer_beside_a_huge_one_is_corrected_by_no_more_than_its_size(tmp_path):
    """Its share of the huge layer's error would be thousands of times its own weight."""
    source = tiny.save("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 3e5
    tensors["model.layers.0.mlp.up_proj.weight"] *= 10
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = sarqc.quantize(source, tmp_path / "out", **SMALL | {"num_samples": 4})
    assert max(result.report["weight_errors"].values()) < 1.5

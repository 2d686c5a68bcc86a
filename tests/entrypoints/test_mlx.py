"""Whole models in MLX's format: there and back, mixtures as stacks, and mlx-lm itself as the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import sarqc
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.checkpoint.verify import problems
from sarqc.entrypoints.convert import convert
from sarqc.errors import CheckpointError
from tests.support import tiny
from tests.support.checkpoints import differences

IDS = list(range(3, 35))
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"sym": False, "include": ["lm_head", "embed_tokens"], "embedding_bits": 6},
    "mixtral": {"bits": 3},
    "qwen3_moe": {"avg_bits": 5.0, "bit_options": (3, 4, 6), "method": "gptq", "num_samples": 2, "seqlen": 64},
    "deepseek_v3": {"ignore": ["kv_b_proj$", r"\.1\.mlp\.experts\."]},
}


@pytest.fixture(scope="module", params=SETTINGS)
def model(request, tmp_path_factory) -> tuple[Path, Path]:
    """A quantized model in the two formats, from one run."""
    folder = tmp_path_factory.mktemp(request.param)
    source = tiny.save(request.param, folder / "source")
    settings = {"method": "rtn", "group_size": 32} | SETTINGS[request.param]
    plain = sarqc.quantize(source, folder / "plain", **settings).out
    return plain, convert(plain, folder / "mlx", format="mlx").out


def test_there_and_back_gives_the_same_weights(model, tmp_path):
    plain, mlx = model
    with open_checkpoint(plain) as first, open_checkpoint(mlx) as second:
        assert second.format is not None and second.format.name == "mlx"
        assert list(differences(second, first)) == [] and list(problems(second)) == []
        assert second.config["quantization"] == second.config["quantization_config"]
        stacked = any("experts" in name for name in first.names() if "shared" not in name)
        assert bool(second.stacks()) == stacked and not any(".experts." in name for name in second.raw_names())
        assert first.storage().quantized_weights == second.storage().quantized_weights
    back = convert(mlx, tmp_path / "back", format="compressed-tensors").out
    assert (back / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (plain, back))
    for config in (before, after):
        config["quantization_config"]["ignore"].sort()
        for group in config["quantization_config"]["config_groups"].values():
            group["targets"].sort()
    assert before == {key: after[key] for key in before}
    assert "quantization" not in after


def test_it_runs_here_and_says_the_same(model):
    logits = [sarqc.load(folder)[0](torch.tensor([IDS])).logits for folder in model]
    assert torch.equal(*logits)


def test_a_changed_bit_in_a_stack_is_found(model, tmp_path):
    _, mlx = model
    with open_checkpoint(mlx) as checkpoint:
        if not checkpoint.stacks():
            pytest.skip("a model without experts")
        name = next(one for one in checkpoint.stacks() if one.endswith("up_proj.weight"))
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in mlx.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    content = bytearray((copy / "model.safetensors").read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    content[8 + int.from_bytes(content[:8], "little") + header[name]["data_offsets"][0] + 5] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with open_checkpoint(copy) as checkpoint:
        assert any(f"{name!r} has changed since it was written" in line for line in problems(checkpoint))


def test_experts_that_differ_fit_no_stack(tmp_path):
    source = tiny.save("mixtral", tmp_path / "source")
    plain = sarqc.quantize(source, tmp_path / "plain", method="rtn", group_size=32, ignore=[r"experts\.2\."]).out
    with pytest.raises(CheckpointError, match=r"experts\.2\.w[123].weight' has other bits, shape or dtype than"):
        convert(plain, tmp_path / "out", format="mlx")
    assert not (tmp_path / "out").exists()


def test_mlx_lm_gives_the_same_logits_and_tokens(model):
    """Beside the packed modules in fp32, MLX in fp32 and in its own dtype: as close as its own rounding allows."""
    mx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
    _, folder = model
    mx.set_default_device(mx.cpu)
    theirs, _ = mlx_lm.load(str(folder))
    exact, _ = sarqc.load(folder, dtype="float32")
    with torch.inference_mode():
        wanted = exact(torch.tensor([IDS])).logits[0]
        own = sarqc.load(folder)[0](torch.tensor([IDS])).logits[0].float()
    if "deepseek" not in str(folder):  # MLX multiplies unquantized experts on a CPU in fp32 alone
        logits = torch.tensor(theirs(mx.array([IDS])).astype(mx.float32).tolist())[0]
        assert (logits - wanted).abs().mean() <= 3 * (own - wanted).abs().mean() + 1e-6
    theirs.set_dtype(mx.float32)
    logits = torch.tensor(theirs(mx.array([IDS])).tolist())[0]
    expanded = '"model.embed_tokens"' in (folder / "report.json").read_text()  # by us, once rounded to bf16
    assert (logits - wanted).abs().max() <= (2**-8 if expanded else 2e-5) * wanted.abs().max() + 1e-6
    text = list(IDS[:8])
    for _ in range(12):
        text.append(int(mx.argmax(theirs(mx.array([text]))[0, -1])))
    mine = exact.generate(torch.tensor([IDS[:8]]), max_new_tokens=12, min_new_tokens=12, do_sample=False)[0].tolist()
    assert text == mine


def test_the_older_names_of_the_config_are_there(tmp_path):
    source = tiny.save("qwen3_moe", tmp_path / "source", rope_parameters={"rope_type": "default", "rope_theta": 5e4})
    assert "rope_theta" not in json.loads((source / "config.json").read_text())
    out = sarqc.quantize(source, tmp_path / "out", method="rtn", group_size=32, format="mlx").out
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == 5e4 and config["num_experts"] == 4
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.get_slice("model.layers.0.mlp.switch_mlp.gate_proj.weight").get_shape()[0] == 4

"""Every example runs, on a tiny model, and what it shows is so. The one that is missing here fails the first test."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

import sarqc
import sarqc_kernels
from sarqc.errors import ArgumentError
from tests.support import tiny

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = dict(num_samples=8, seqlen=32, group_size=32)
MAX_LINES = 80


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


def test_each_is_short_and_run_here():
    ours = {path.stem: path for path in EXAMPLES.glob("*.py") if path.stem != "demo"}  # `make demo`, minutes long
    run = re.findall(r'example\("(\w+)"\)', Path(__file__).read_text(encoding="utf-8"))
    assert set(run) == set(ours)
    for path in ours.values():
        assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_LINES, path


def test_quantize_a_hub_model(llama, tmp_path, capsys):
    result = example("quantize_a_hub_model").main(str(llama), tmp_path / "out", **SMALL)
    assert result.report["quant"]["bits"] == 4
    printed = capsys.readouterr().out
    assert f"{result.report['size']['bits_per_weight']} bits per quantized weight" in printed
    assert "The most important thing about a library is" in printed


def test_chat_calibration(tmp_path):
    folder = tiny.save("llama", tmp_path / "model")
    template = "{% for m in messages %}<end>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    chat = [{"role": "user", "content": "What is a name"}, {"role": "assistant", "content": "A binding. " * 100}]
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps({'messages': chat})}\n\n{json.dumps({'messages': chat})}\n", encoding="utf-8")
    module = example("chat_calibration")
    result = module.main(str(folder), tmp_path / "out", str(path), seqlen=32, num_samples=8, group_size=32)
    assert result.report["calibration"]["text"] == "given conversations"
    assert next(iter(module.conversations(None)))[1]["role"] == "assistant"


def test_a_new_solver(own_methods, llama, tmp_path):
    module = example("a_new_solver")
    errors = module.main(str(llama), tmp_path, **SMALL)
    report = json.loads((tmp_path / "least-squares" / "report.json").read_text(encoding="utf-8"))
    assert report["method"]["method"] == "least-squares"
    assert errors["sarqc-gptq"] < errors["least-squares"] < report["rtn_error"]
    assert errors["least-squares"] != errors["rtn-search"]
    with pytest.raises(ArgumentError, match="symmetric"):
        module.main(str(llama), tmp_path / "asym", sym=False, **SMALL)


def test_examples_use_public_names_only():
    """What an example needs is the public interface: names of the two packages themselves, nothing below them."""
    for path in EXAMPLES.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert all("." not in alias.name for alias in node.names if alias.name.startswith("sarqc")), path
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sarqc"):
                package = {"sarqc": sarqc, "sarqc_kernels": sarqc_kernels}.get(node.module or "")
                assert package is not None, f"{path.name}:{node.lineno}: from {node.module}"
                assert {alias.name for alias in node.names} <= set(package.__all__), path
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sarqc":
                assert node.attr in sarqc.__all__, f"{path.name}:{node.lineno}: sarqc.{node.attr}"


def test_kernels_alone():
    errors = example("kernels_alone").main("cpu")
    assert errors["feedback"] < errors["rounding"] / 2


def test_starved_experts(tmp_path, capsys):
    result = example("starved_experts").main(tmp_path)
    starved = [site["rows"].count(0) for site in result.report["sites"] if len(site["rows"]) > 1]
    assert len(starved) == 4 and min(starved) > 0
    assert all(site["error"] < site["rtn_error"] for site in result.report["sites"])
    printed = capsys.readouterr().out
    assert all(f" {count} " in printed for count in starved) and "borrows from its layer: 16" in printed  # of 64 inputs
    assert "quantized by RTN instead of solved: none" in printed
    assert sarqc.load(result.out)[0].config.num_experts == 16


def test_eight_gpus(llama, tmp_path, monkeypatch):
    """With two processes on the CPU; tests/pipeline/test_distributed.py holds what they compute."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ("--num-samples", "8", "--seqlen", "32", "--group-size", "32", "--device", "cpu")
    assert example("eight_gpus").main(str(llama), str(tmp_path / "out"), *options, processes=2) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["targets"]["quantized"] == 14

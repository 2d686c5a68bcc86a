"""The command line, as a process of its own: what lands on stdout and stderr, and the exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sarqc.config import METHODS, MethodConfig
from sarqc.options import record
from tests.support import tiny
from tests.support.command import in_child as sarqc

RUN = ["--num-samples", "4", "--seqlen", "64"]


def fresh(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A process that imports everything, as a user starts it."""
    return subprocess.run([sys.executable, "-m", "sarqc", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    done = fresh("quantize", source, "-o", out, *RUN)
    assert done.returncode == 0, done.stderr
    assert "blocks 2/2" in done.stderr and "group size 64" in done.stderr
    assert "bits with scales" in done.stdout
    return out


def test_json_is_one_object_and_nothing_else(source, quantized, tmp_path):
    commands = [
        ("quantize", source, "-o", tmp_path / "out", *RUN),
        ("eval", quantized, "--seqlen", 64, "--max-windows", 2),
        ("eval", quantized, "--seqlen", 64, "--max-windows", 2, "--expanded"),
        ("generate", quantized, "--prompt", "a list", "--max-new-tokens", 3),
        ("inspect", quantized),
    ]
    values = [json.loads(sarqc(*command, "--json").stdout) for command in commands]
    assert values[0]["method"]["method"] == "sarqc-gptq" and values[0]["out"] == str(tmp_path / "out")
    assert values[1]["perplexity"] > 1 and values[1]["protocol"]["windows"] == 2
    assert (values[1]["protocol"]["packed"], values[1]["protocol"]["dtype"]) == (True, "float32")
    assert (values[2]["protocol"]["packed"], values[2]["protocol"]["dtype"]) == (False, "float32")
    assert values[1]["perplexity"] == pytest.approx(values[2]["perplexity"], rel=0.01)
    assert values[3]["text"].startswith("a list")
    planned = sarqc("quantize", source, "-o", tmp_path / "dry", *RUN, "--dry-run", "--json")
    assert json.loads(planned.stdout)["output_bytes"] == values[0]["size"]["bytes"] and not (tmp_path / "dry").exists()
    assert values[4]["quantized_linears"] == 14 and values[4]["report"]["quant"]["bits"] == 4


def test_a_config_file_gives_defaults_and_the_command_line_wins(source, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("bits: 3\ngroup-size: 32\nmethod: rtn\nignore: ['o_proj$']\n")
    done = sarqc("quantize", source, "-o", tmp_path / "out", "--config", config, "--bits", 2, "--json")
    report = json.loads(done.stdout)
    assert report["quant"] == {"bits": 2, "group_size": 32, "sym": True, "ignore": ["o_proj$"]}
    assert report["method"]["method"] == "rtn"


def broken(source: Path, folder: Path, change) -> Path:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


def explode(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.input_layernorm.weight"].fill_(float("inf"))


def refused(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("sarqc: ")
    for text in expected:
        assert text in last, last


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--bits", 9), ("bits = 9", "2 to 8")),
        (("--group-size", 48), ("group_size = 48", "model.layers.0.self_attn.q_proj")),
        (("--group-size", "many"), ("group_size", "many")),
        (("--reg-lambda", "-1"), ("reg_lambda", "-1")),
        (("--method", "magic"), ("magic", "sarqc-gptq")),
        (("--saliency", "magic"), ("saliency", "magic", "power:A")),
        (("--ignore", "no_such_layer"), ("no_such_layer",)),
        (("--device", "cuda:7"), ("cuda:7",)),
        (("--dataset", "nowhere.txt"), ("nowhere.txt",)),
        (("--num-samples", 100000), ("100000",)),
        (("--seqlen", 1000000), ("256 positions", "1000000")),
        (("--config", "nowhere.yaml"), ("nowhere.yaml",)),
    ],
)
def test_bad_settings_are_one_line(source, tmp_path, arguments, expected):
    refused(sarqc("quantize", source, "-o", tmp_path / "out", *arguments), *expected)
    assert list(tmp_path.iterdir()) == []


def test_bad_models_and_texts_are_one_line(source, quantized, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    out = tmp_path / "out"
    nan, inf = broken(source, tmp_path / "nan", poison), broken(source, tmp_path / "inf", explode)
    encoder = tmp_path / "encoder"
    broken(source, encoder, lambda tensors: None)
    (encoder / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    cases = [
        (("no/such/folder",), ("no/such/folder",)),
        ((encoder,), ("ViTModel",)),
        ((source, "--dataset", empty), ("empty",)),
        ((nan, *RUN), ("model.layers.1.mlp.up_proj",)),
        ((inf, *RUN), ("model.layers.0",)),
    ]
    for arguments, expected in cases:
        refused(sarqc("quantize", *arguments, "-o", out), *expected)
        assert not out.exists()
        kept = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        # The NaN is in the second block: the first one is finished, and kept for whoever repairs the second.
        assert kept == ([tmp_path / ".out.work"] if nan in arguments else [])
        if kept:
            shutil.rmtree(kept[0])
    refused(sarqc("quantize", source, "-o", quantized, *RUN), "--overwrite")
    refused(sarqc("quantize", source, "-o", source / "inside", *RUN), str(source))
    refused(sarqc("inspect", source), "not quantized")
    refused(sarqc("eval", source, "--text", empty, "--seqlen", 64), "empty")
    refused(sarqc("generate", source, "--prompt", ""), "prompt")


def unread() -> int:
    """The writing end of a pipe that nobody reads any more, as in `sarqc ... | true`."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.fault("nobody reads what is printed, or its disk is full")
def test_who_stops_reading_ends_no_run(source, quantized, tmp_path, outcomes):
    command = [sys.executable, "-m", "sarqc"]
    shown = subprocess.run(
        [*command, "inspect", quantized, "--json"], stdout=unread(), stderr=subprocess.PIPE, text=True
    )
    assert (shown.returncode, shown.stderr) == (128 + signal.SIGPIPE, "")
    out = tmp_path / "out"
    for stderr in (unread(), os.open("/dev/full", os.O_WRONLY)):
        done = subprocess.run([*command, "quantize", source, "-o", out, "--overwrite", *RUN], stderr=stderr)
        outcomes.recovered(
            (done.returncode, (out / "model.safetensors").read_bytes()),
            (0, (quantized / "model.safetensors").read_bytes()),
        )


@pytest.mark.fault("nobody reads what is printed, or its disk is full")
def test_a_full_disk_under_the_output_is_one_line(quantized, outcomes):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sarqc", "inspect", quantized, "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    [line] = done.stderr.splitlines()
    assert done.returncode == 2 and "standard output cannot be used: No space left on device" in line
    outcomes.clear_error(line)


PRESS = """
import os, signal, sys
from sarqc.cli import main, terminal

def stage(self, block, name):
    if (block, name) == (0, "load"):
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)

terminal.RunProgress.stage = stage
times = int(sys.argv.pop())
main()
"""


@pytest.mark.parametrize(("times", "message"), [(1, "stopped after block 1 of 2"), (2, "stopped at once")])
def test_ctrl_c_is_exit_130_and_the_same_command_goes_on(source, quantized, tmp_path, times, message):
    out = tmp_path / "out"
    command = ["quantize", str(source), "-o", str(out), *RUN]
    pressed = subprocess.run([sys.executable, "-c", PRESS, *command, str(times)], capture_output=True, text=True)
    assert pressed.returncode == 130 and not out.exists(), pressed.stderr
    last = pressed.stderr.strip().splitlines()[-1]
    assert last.startswith(f"sarqc: {message}") and "command" in last
    if times == 1:
        done = sarqc(*command)
        assert done.returncode == 0 and "block 2 of 2" in done.stderr
        assert (out / "model.safetensors").read_bytes() == (quantized / "model.safetensors").read_bytes()


def test_help_teaches_and_is_quick():
    shown = fresh("quantize", "--help")
    assert shown.returncode == 0 and "Example:" in shown.stdout and "--group-size" in shown.stdout
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert all(f"{method} {about.about}" in lines for method, about in METHODS.items())


def test_saliency_and_lambda_reach_the_solver(source, tmp_path):
    options = ("--method", "sarqc-awq-gptq", "--saliency", "power:0.5", "--reg-lambda", "0.3")
    done = sarqc("quantize", source, "-o", tmp_path / "out", *RUN, *options, "--json")
    report = json.loads(done.stdout)
    assert report["method"] == record(MethodConfig("sarqc-awq-gptq", saliency="power:0.5", reg_lambda=0.3))
    assert all(site["reg_lambda"] == pytest.approx(0.3) for site in report["sites"])


def test_a_report_is_made_again_and_quality_is_saved_into_it(source, quantized, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy)
    (copy / "report.html").unlink()
    done = sarqc("report", copy)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == str(copy / "report.html")
    assert done.stdout.startswith("It went well: 4 bits by")
    assert (copy / "report.html").read_bytes() == (quantized / "report.html").read_bytes()
    saved = json.loads(sarqc("eval", copy, "--save", "--seqlen", 64, "--max-windows", 2, "--json").stdout)
    assert saved["before"] > 1 and saved["card"]
    printed = json.loads(sarqc("report", copy, "--json").stdout)
    assert f"perplexity {saved['before']:.2f}" in printed["verdict"] and printed["good"]
    refused(sarqc("report", source), "report.json")
    refused(sarqc("eval", source, "--save"), "report.json")
    refused(sarqc("eval", copy, "--save", "--tasks", "cloze"), "--save")


def test_compare_prints_a_table_and_goes_on(source, tmp_path):
    arguments = ["compare", source, "-o", tmp_path / "out", "--methods", "rtn,gptq", "--bits", "3", "--seqlen", "32"]
    arguments += ["--num-samples", "2", "--eval-seqlen", "32", "--eval-windows", "2"]
    done = sarqc(*arguments)
    assert done.returncode == 0, done.stderr
    assert "W3 g64" in done.stdout and "best" in done.stdout and "cells 2/2" in done.stderr
    again = sarqc(*arguments, "--json")
    assert "2 cells, 2 of them there already" in again.stderr
    assert [cell["method"] for cell in json.loads(again.stdout)["cells"]] == ["rtn", "gptq"]
    refused(sarqc(*arguments, "--seeds", "one"), "seeds = 'one'")
    refused(sarqc(*arguments, "--also", "x"), "METHOD:BITS")

"""What people type and what their machines are like: every mistake is one line that names the argument, the value and
the way out, told before any work is done."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sarqc import cli
from sarqc.checkpoint.folders import check_place
from sarqc.errors import CheckpointError
from tests.support import tiny

RTN = ("--method", "rtn", "--group-size", "32")
SHORT = ("--num-samples", "2", "--seqlen", "32", "--group-size", "32", "--reg-lambda", "0.3")
LONG = "x" * 300


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "a model of Zoë")


def spoiled(source: Path, folder: Path, name: str) -> Path:
    """A copy of the model with a NaN in one tensor."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[7] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no command: quantize"),
        (("nonsense",), "No such command 'nonsense'; `sarqc --help`"),
        (("quantize",), "Missing argument 'model'; `sarqc quantize --help`"),
        (("quantize", "m", "-o"), "requires an argument"),
        (("quantize", "m", "-o", "o", "--nope"), "No such option: --nope"),
        (("quantize", "m", "-o", "o", "--bits", "four"), "bits = "),
        (("quantize", "m", "-o", "o", "--gram-budget", "nan"), "gram_budget = 'nan'"),
        (("quantize", "m", "-o", "o", "--gram-budget", "inf"), "gram_budget = 'inf'"),
        (("quantize", "m", "-o", "o", "--gram-budget", "-1"), "gram_budget = '-1'"),
        (("quantize", "m", "-o", "o", "--bits", "4", "--avg-bits", "3.5"), "bits = 4 and avg_bits = 3.5 exclude each"),
        (("eval", "m", "--tasks", " ,"), "--tasks ' ,' names none"),
        (("eval", "m", "--original", "o"), "--original 'o' has no effect alone: give --save too"),
        (("eval", "m", "--limit", "3"), "--limit 3 has no effect without --tasks"),
        (("compare", "m", "-o", "o", "--also", "rtn:4:32::=/nope"), "'/nope' is no folder of a checkpoint"),
    ],
)
def test_words_that_make_no_command(door, arguments, message):
    code, line = door(*arguments)
    assert code == 2 and message in line, line


def test_a_dry_run_refuses_an_output_that_the_run_would_refuse(source, door, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    code, line = door("quantize", source, "-o", tmp_path / "out", *SHORT, "--dry-run")
    assert code == 2 and "exists and is not empty" in line, line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seqlen", "0"), "seqlen = 0 "),
        (("--seqlen", "300"), "seqlen = 300 is more than the 256 positions of "),
        (("--num-samples", "0"), "num_samples = 0 "),
        (("--num-samples", "0", "--dry-run"), "num_samples = 0 "),
        (("--seed", "-1", *SHORT), "seed = -1 "),
        (("--seed", str(1 << 64), *SHORT), f"seed = {1 << 64} "),
        (("--bits", "1", *RTN), "bits = 1 "),
        (("--method", "rtn", "--group-size", "7"), "group_size = 7 "),
        ((*SHORT[:-1], "-1"), "reg_lambda = -1.0 "),
        (("--tp", "3", *RTN), "tp = 3: "),
        (("--work-dir", LONG, *RTN), "work folder 'xxx"),
        (("--dataset", LONG, *SHORT), "no such file"),
        (("--dataset", "~nobody-of-this-name/x.txt", *SHORT), "no such file"),
    ],
)
def test_settings_that_cannot_be(source, door, tmp_path, arguments, message):
    code, line = door("quantize", source, "-o", tmp_path / "out", *arguments)
    assert code == 2 and message in line and list(tmp_path.iterdir()) == [], line


def test_a_text_in_another_encoding(source, door, tmp_path):
    (tmp_path / "text").write_bytes("naïve café ".encode("latin-1") * 200)
    code, line = door("quantize", source, "-o", tmp_path / "out", "--dataset", tmp_path / "text", *SHORT)
    assert code == 2 and "is not UTF-8 (invalid continuation byte): convert it" in line, line


@pytest.mark.parametrize("name", [LONG, "y" * 245, "not UTF-8: \udcff"])
def test_names_that_no_folder_can_have(source, door, tmp_path, name):
    """245 letters are a name, but those of the hidden folders beside it are longer."""
    for arguments in (
        ("quantize", source, "-o", tmp_path / name, *RTN),
        ("quantize", source, "-o", tmp_path / "out", "--work-dir", tmp_path / name, *RTN),
        ("compare", source, "-o", tmp_path / name),
        ("convert", source, "-o", tmp_path / name, "--format", "gptq"),
    ):
        code, line = door(*arguments)
        assert code == 2, line
        assert "cannot be used (File name too long)" in line or "is not UTF-8" in line or "not quantized" in line, line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", [LONG, "~nobody-of-this-name/x", "not UTF-8: \udcff"])
def test_models_that_no_folder_can_be(door, tmp_path, model):
    for command in (("quantize", model, "-o", tmp_path / "out"), ("eval", model), ("generate", model, "--prompt", "x")):
        code, line = door(*command)
        assert code == 2 and "is no name of a folder" in line, line


def test_the_argument_that_is_wrong_is_named(source, door, tmp_path):
    code, line = door("quantize", source, "-o", tmp_path / "out", "--work-dir", source / "work", *RTN)
    assert code == 2 and line.startswith("sarqc: work folder ") and "inside the model's own folder" in line, line


@pytest.mark.fault("no right to write in a folder, or to read a file")
@pytest.mark.parametrize("place", ["output", "report"])
def test_places_where_nothing_may_be_written(tmp_path, monkeypatch, outcomes, place):
    """Asked of the operating system, whose answer is another for the superuser."""
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(CheckpointError, match=f"{place} .*no right to write in") as caught:
        check_place(tmp_path / "deep" / "er" / "out", place)
    outcomes.clear_error(caught.value)


@pytest.mark.fault("no right to write in a folder, or to read a file")
def test_a_file_of_the_model_that_may_not_be_read_is_told_before_the_run(source, door, tmp_path, monkeypatch):
    access = os.access
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "tokenizer.json" and access(path, mode))
    code, line = door("quantize", source, "-o", tmp_path / "out", *RTN)
    assert code == 2 and "tokenizer.json cannot be read" in line and list(tmp_path.iterdir()) == [], line


@pytest.mark.fault("NaN in a tensor outside the blocks")
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_what_would_be_refused_in_the_end_is_refused_in_the_beginning(source, door, tmp_path, name):
    model = spoiled(source, tmp_path / "model", name)
    code, line = door("quantize", model, "-o", tmp_path / "out", *RTN)
    assert code == 2 and f"{name} holds NaN; repair the checkpoint" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_without_a_tokenizer(source, door, tmp_path):
    model = Path(shutil.copytree(source, tmp_path / "model", ignore=shutil.ignore_patterns("*token*")))
    code, line = door("quantize", model, "-o", tmp_path / "out", *SHORT)
    assert code == 2 and "has no tokenizer: put tokenizer.json or its like beside config.json" in line, line
    assert door("quantize", model, "-o", tmp_path / "out", *RTN)[0] == 0  # which looks at no text


@pytest.mark.fault("absurd numbers in config.json")
def test_a_configuration_that_builds_and_does_not_run(door, tmp_path):
    model = tiny.save("qwen3_moe", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 400}))
    code, line = door("quantize", model, "-o", tmp_path / "out", *SHORT)
    assert code == 2 and "does not run as config.json says" in line and "block 0" in line, line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 5000, "cannot be read as YAML"),
        ("- bits", "must hold option: value lines"),
        ("no-such: 1", "no-such is not an option"),
        ("o: x", "o is not an option"),
        ("bits: [1]", "bits = "),
        ("!!python/object/apply:os.abort []", "cannot be read as YAML"),
    ],
)
def test_config_files(source, door, tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    code, line = door("quantize", source, "-o", tmp_path / "out", "--config", tmp_path / "run.yaml", *RTN)
    assert code == 2 and message in line, line


def test_a_config_file_has_the_names_of_the_options(source, door, tmp_path, capsys):
    """--json is `as_json` inside, --ignore takes one or several."""
    (tmp_path / "run.yaml").write_text("json: true\ndry-run: true\nignore: o_proj\nmethod: rtn\n")
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **how: printed.extend(map(str, words)))
        assert door("quantize", source, "-o", tmp_path / "out", "--config", tmp_path / "run.yaml")[0] == 0
    kinds = json.loads(printed[0])["kinds"]
    assert [kind["left"] for kind in kinds if "o_proj" in kind["name"]] == ["ignore o_proj"]


def test_tasks_are_named_with_blanks_between(door, monkeypatch):
    asked = []
    monkeypatch.setattr("sarqc.entrypoints.evaluate.zero_shot", lambda model, tasks, **how: asked.extend(tasks) or {})
    assert door("eval", "m", "--tasks", "a, b ,,c") == (0, "") and asked == ["a", "b", "c"]


HOST = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.\nmore")


@pytest.mark.parametrize(
    ("command", "error", "message"),
    [
        (
            ("eval", "m"),
            torch.OutOfMemoryError("CUDA out of memory"),
            "CUDA out of memory); use a smaller --seqlen, or",
        ),
        (("generate", "m", "--prompt", "p"), HOST, "[enforce fail] DefaultCPUAllocator"),
        (("chat", "m"), MemoryError(), "of this machine); use a smaller --max-new-tokens"),
        (("compare", "m", "-o", "o"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), "CUBLAS_STATUS_ALLOC_FAILED); use"),
    ],
)
def test_memory_that_runs_out(door, monkeypatch, command, error, message):
    def full(*args, **options):
        raise error

    for place in ("load.locate", "compare.locate_source"):
        monkeypatch.setattr(f"sarqc.entrypoints.{place}", full)
    code, line = door(*command)
    assert code == 2 and line.startswith(f"sarqc: {command[0]}: out of memory ({message}"), line


def test_an_error_that_is_none_of_memory_stays_what_it_is(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("an illegal access")

    monkeypatch.setattr("sarqc.entrypoints.load.locate", broken)
    monkeypatch.setattr(sys, "argv", ["sarqc", "eval", "m"])
    with pytest.raises(RuntimeError, match="an illegal access"):
        cli.main()


@pytest.mark.parametrize("size", ["x", "0", "-2", "2.0"])
def test_an_environment_that_torchrun_did_not_make(source, door, tmp_path, monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    code, line = door("quantize", source, "-o", tmp_path / "out", *RTN)
    assert code == 2 and f"WORLD_SIZE = {size!r} in the environment" in line, line


def test_a_rank_of_nothing_is_nothing(source, tmp_path, monkeypatch, capsys):
    """RANK alone, as some schedulers set it: one process, which shows what it did."""
    from sarqc.pipeline.distributed import is_leader

    for rank in ("1", "x"):
        monkeypatch.setenv("RANK", rank)
        assert is_leader()


def test_serving_is_told_by_verify(source, door, tmp_path, monkeypatch, capsys):
    assert door("quantize", source, "-o", tmp_path / "out", *RTN)[0] == 0
    printed: list[str] = []
    monkeypatch.setattr(sys.modules["sarqc.cli.verify"], "print_line", lambda console, line: printed.append(line))
    monkeypatch.setattr("builtins.print", lambda *words, **how: printed.extend(map(str, words)))
    assert door("verify", tmp_path / "out")[0] == 0
    assert "sound; " in printed[0]
    support = dict(line.strip().split(": ", 1) for line in printed[1:])
    assert support["vLLM 0.33, sm_80"].startswith(
        "tp 1, 2 (Marlin 14); not at tp 4: model.layers.*.self_attn.o_proj: 16 "
    )
    assert support["transformers 5.23"] == "tp 1 (expanded on loading 14)"
    printed.clear()
    assert door("verify", tmp_path / "out", "--json")[0] == 0
    serve = json.loads(printed[0])["serve"]
    assert {one["server"] for one in serve} == set(support) and serve[0]["kernels"] == {"Marlin": 14}

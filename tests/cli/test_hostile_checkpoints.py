"""Folders from strangers, through the front door: whatever is in them, one line and exit code 2, or a sound result.

The command line runs in this process, so that a traceback of any kind fails the test that met it. Mutations are drawn
by hypothesis, the same ones on every run.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sarqc
from sarqc.checkpoint.headers import read_header
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.entrypoints.convert import convert
from sarqc.errors import CheckpointError
from tests.support import tiny
from tests.support.checkpoints import write_weights
from tests.support.faults import CLEAR

QUIET = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
VALUES: list[Any] = [
    None, True, 0, -1, 7, 10**6, 10**12, 2**63, 10**30, 0.5, float("nan"), float("inf"), "", "x", "../x",
    "/etc/passwd", "a\nb", "\x1b[31m", "[/red]", [], [1], [[[]]], {}, {"a": 1},
]  # fmt: skip
RTN = ("--method", "rtn", "--group-size", "32")


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def mutate(value: Any, draw: random.Random) -> None:
    """Changes one place of a JSON value, however deep: another value there, a key gone, or one more of it."""
    place, key = value, None
    while isinstance(place, dict | list) and place and (key is None or draw.random() < 0.8):
        holder, key = place, draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place = holder[key]
    if key is None:
        return
    what = draw.random()
    if what < 0.2:
        del holder[key]
    elif what < 0.3 and isinstance(holder, dict):
        holder[str(draw.choice(VALUES))] = holder[key]
    else:
        holder[key] = draw.choice([*VALUES, deep(50), deep(300)])


def mutate_file(path: Path, draw: random.Random) -> None:
    """The same for a JSON file, or for the header of a safetensors file; sometimes bytes instead of values."""
    data = path.read_bytes()
    begin = 8 + struct.unpack_from("<Q", data)[0] if path.suffix == ".safetensors" else 0
    if draw.random() < 0.25:
        changed = bytearray(data)
        changed[draw.randrange(begin or len(data))] = draw.randrange(256)
        path.write_bytes(changed)
        return
    content = json.loads(data[8:begin] if begin else data)
    inner = content.get("quantization_config") if draw.random() < 0.6 else None
    mutate(inner or content, draw)
    text = json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[begin:] if begin else text)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A model, and quantized ones: in shards with an index, and as GPTQ and AWQ."""
    base = tmp_path_factory.mktemp("models")
    folders = {"source": tiny.save("llama", base / "source"), "moe": tiny.save("qwen3_moe", base / "moe")}
    whole = sarqc.quantize(folders["source"], base / "whole", method="rtn", group_size=32, sym=False).out
    folders["shards"] = base / "shards"
    with open_checkpoint(whole) as checkpoint:
        tensors = {name: checkpoint.raw_load(name) for name in checkpoint.raw_names()}
        write_weights(folders["shards"], tensors, shard_bytes=60_000)
    for name in ("config.json", "report.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / name, folders["shards"])
    for format in ("gptq", "awq"):
        folders[format] = convert(whole, base / format, format=format).out
    return folders


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.fault("a mutated header, index or config.json")
def test_mutated_files_are_read_or_refused(models, tmp_path, outcomes):
    """400 of them, through `open_checkpoint` and a look at every weight."""
    kinds = ("shards", "gptq", "awq", "source")

    @settings(QUIET, max_examples=400)
    @given(draw=st.randoms(use_true_random=False))
    def once(draw: random.Random) -> None:
        folder = models[draw.choice(kinds)]
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for path in folder.iterdir():
            (copy / path.name).symlink_to(path) if path.suffix == ".jinja" else shutil.copyfile(path, copy / path.name)
        targets = [
            path
            for path in copy.iterdir()
            if path.suffix == ".safetensors" or path.name.startswith(("config", "model"))
        ]
        mutate_file(draw.choice(sorted(targets)), draw)
        try:
            with open_checkpoint(copy) as checkpoint:
                checkpoint.storage()
            outcomes.still_valid()
        except CheckpointError as error:
            assert str(copy) in str(error)
            outcomes.clear_error(error)

    once()
    trials = sum(outcomes.counts.values())
    assert trials >= 400 and 0.3 < outcomes.counts[CLEAR] / trials < 0.95


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("shards", ("inspect", "{}")),
        ("gptq", ("inspect", "{}", "--json")),
        ("awq", ("verify", "{}", "--against", "{source}")),
        ("shards", ("convert", "{}", "-o", "{out}", "--format", "gptq_v2")),
        ("source", ("quantize", "{}", "-o", "{out}", *RTN)),
        ("moe", ("quantize", "{}", "-o", "{out}", *RTN)),
    ],
    ids=["inspect", "inspect-json", "verify", "convert", "quantize", "quantize-moe"],
)
@pytest.mark.fault("a mutated header, index or config.json")
def test_mutated_files_through_the_door(models, door, tmp_path, kind, command):
    """Nothing is written but the output, and that only whole."""
    trials = 40 if command[0] in ("inspect", "verify") else 25
    copy, out = tmp_path / "copy", tmp_path / "out"
    filled = [part.format(copy, out=out, source=models["source"]) for part in command]

    @settings(QUIET, max_examples=trials)
    @given(draw=st.randoms(use_true_random=False))
    def once(draw: random.Random) -> None:
        for old in (copy, out):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(models[kind], copy)
        mutate_file(draw.choice(sorted(p for p in copy.iterdir() if p.suffix in (".json", ".safetensors"))), draw)
        before = names(tmp_path)
        code, _ = door(*filled)
        written = {name for name in names(tmp_path) - before if name != "out" and not name.startswith("out/")}
        assert not written and (code == 0 and "-o" in filled) == out.exists()

    once()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000"),
        ({"num_hidden_layers": 5000}, "asks for 5000 layers"),
        ({"num_hidden_layers": -1}, "no"),
        ({"num_hidden_layers": 0}, "decoder blocks"),
        ({"hidden_size": 10**9}, "hidden_size = 1000000000"),
        ({"head_dim": 10**8}, "head_dim = 100000000"),
        ({"vocab_size": -5}, "negative dimension -5"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"intermediate_size": float("nan")}, "intermediate_size"),
        ({"num_attention_heads": 0}, "no"),
        ({"num_labels": 10**9}, "num_labels = 1000000000"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10**40}}, "rope_theta"),
        ({"architectures": [7]}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"model_type": ["llama"]}, "no usable configuration"),
        ({"levels": 150}, "nested too deep"),
        ({"levels": 100_000}, "nested too deep"),
        ({"quantization_config": []}, "no usable configuration"),
    ],
)
@pytest.mark.fault("absurd numbers in config.json")
def test_absurd_configurations(models, door, tmp_path, change, message):
    folder = Path(shutil.copytree(models["source"], tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    levels = change.get("levels", 0)
    text = json.dumps(config if levels else config | change)
    (folder / "config.json").write_text(text[:-1] + ', "extra": ' + "[" * levels + "1" + "]" * levels + "}")
    code, line = door("quantize", folder, "-o", tmp_path / "out", *RTN)
    assert code == 2 and message in line, line
    assert names(tmp_path) == {"model", *(f"model/{path.name}" for path in folder.iterdir())}


@pytest.mark.fault("code that comes with a model")
def test_code_in_a_model_is_never_run(models, door, tmp_path):
    """Python files that config.json and the tokenizer point at, a pickle beside the weights: none of them runs."""
    folder = Path(shutil.copytree(models["source"], tmp_path / "model"))
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokens: pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokens", None]}
    tokens = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "auto_map": auto,
        "tokenizer_class": "Tokens",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    short = ("--num-samples", 2, "--seqlen", 32)
    for changed in (config | {"auto_map": auto, "model_type": "evil"}, config | {"auto_map": auto}, config):
        (folder / "config.json").write_text(json.dumps(changed))
        door("quantize", folder, "-o", tmp_path / "out", *short)
        door("eval", folder, "--max-windows", 1, "--seqlen", 32)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    pickled = f"cbuiltins\nopen\n(V{marker}\nVw\ntR.".encode()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickled)
    code, line = door("quantize", folder, "-o", tmp_path / "out", *short)
    assert code == 2 and "pickle" in line
    assert not marker.exists() and names(tmp_path) - names(folder) == {
        "model",
        *(f"model/{name}" for name in names(folder)),
    }


@pytest.mark.fault("the tokenizer of another model")
def test_a_tokenizer_with_more_tokens_than_the_embedding(door, tmp_path):
    folder = tiny.save("llama", tmp_path / "model", vocab_size=128)
    commands = [
        ("quantize", folder, "-o", tmp_path / "out", "--num-samples", 2, "--seqlen", 32),
        ("eval", folder, "--max-windows", 1, "--seqlen", 32),
        ("generate", folder, "--prompt", "the statement"),
    ]
    for command in commands:
        code, line = door(*command)
        assert code == 2 and "embedding has 128 rows: the tokenizer is another" in line, line
    assert names(tmp_path) == {"model", *(f"model/{path.name}" for path in folder.iterdir())}


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", lambda text: text[: len(text) // 2]),
        ("tokenizer.json", lambda text: "{}"),
        ("tokenizer.json", lambda text: text.replace('"type":', '"kind":')),
        ("tokenizer_config.json", lambda text: json.dumps(json.loads(text) | {"model_max_length": "long"})),
    ],
    ids=["half", "empty", "types", "length"],
)
@pytest.mark.fault("a damaged tokenizer")
def test_damaged_tokenizers(models, door, tmp_path, file, change):
    folder = Path(shutil.copytree(models["source"], tmp_path / "model"))
    (folder / file).write_text(change((folder / file).read_text()))
    code, line = door("quantize", folder, "-o", tmp_path / "out", "--num-samples", 2, "--seqlen", 32)
    assert code == 2 and "tokenizer" in line and not (tmp_path / "out").exists(), line


@pytest.mark.fault("a truncated shard")
def test_a_shard_cut_at_every_boundary(models, tmp_path, outcomes):
    """At, before and behind the ends of the length, the header and every tensor, and at the end but one."""
    folder = Path(shutil.copytree(models["gptq"], tmp_path / "model"))
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    entries = read_header(file).values()
    edges = {0, 8, min(entry.begin for entry in entries), len(whole)}
    edges |= {entry.begin for entry in entries} | {entry.begin + entry.nbytes for entry in entries}
    cuts = sorted({edge + step for edge in edges for step in (-1, 0, 1) if 0 <= edge + step < len(whole)})
    for size in cuts:
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model.safetensors is (truncated|empty|damaged)") as caught:
            open_checkpoint(folder)
        outcomes.clear_error(caught.value)


@pytest.mark.fault("a truncated shard")
@pytest.mark.parametrize("command", ["inspect", "verify", "convert -o o --format awq"])
def test_a_shard_cut_short_through_the_door(models, door, tmp_path, command):
    folder = Path(shutil.copytree(models["gptq"], tmp_path / "model"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    name, *options = [str(tmp_path / part) if part == "o" else part for part in command.split()]
    assert door(name, folder, *options)[0] in (1, 2) and not (tmp_path / "o").exists()


def test_verify_answers_with_its_exit_code(models, door, tmp_path, capsys):
    folder = Path(shutil.copytree(models["awq"], tmp_path / "model"))
    assert door("verify", folder, "--against", models["source"])[0] == 0
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-100] ^= 4
    (folder / "model.safetensors").write_bytes(data)
    assert door("verify", folder)[0] == 1
    assert door("verify", folder, "--json")[0] == 1
    assert door("verify", tmp_path / "nothing")[0] == 2

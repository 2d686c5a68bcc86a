"""Bad and hostile folders: each is one line that names the file, and never a traceback of another kind."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from sarqc.checkpoint.reader import open_checkpoint
from sarqc.errors import CheckpointError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def refusal(outcomes) -> Callable[[Path], str]:
    """refusal(folder): the one line that opening it ends with."""

    def refuse(folder: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(folder)
        outcomes.clear_error(caught.value)
        assert str(folder) in str(caught.value)
        return str(caught.value)

    return refuse


def test_folder(tmp_path, refusal):
    assert "does not exist" in refusal(tmp_path / "no")
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in refusal(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        (b"", "not usable JSON"),
        (b"{", "not usable JSON"),
        (b"[1]", "JSON list"),
        (b"7", "JSON int"),
        (b"null", "JSON NoneType"),
        (b"\xff\xfe{}", "not usable JSON"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not usable JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' is given twice"),
    ],
)
@pytest.mark.fault("an unusable config.json")
def test_config(two_shards, content, message, refusal):
    (two_shards / "config.json").unlink()
    if content is not None:
        (two_shards / "config.json").write_bytes(content)
    line = refusal(two_shards)
    assert message in line and "config.json" in line


def test_config_that_is_a_folder(two_shards, refusal):
    (two_shards / "config.json").unlink()
    (two_shards / "config.json").mkdir()
    assert "config.json is not a regular file" in refusal(two_shards)


@pytest.mark.fault("a pickle in the weights' place")
def test_no_weights(two_shards, refusal):
    for file in (FIRST, SECOND, INDEX):
        (two_shards / file).unlink()
    assert "neither model.safetensors nor" in refusal(two_shards)
    (two_shards / "pytorch_model.bin").write_bytes(b"x")
    line = refusal(two_shards)
    assert "'pytorch_model.bin'" in line and "not read" in line and "convert the model to safetensors" in line


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not usable JSON"),
        ("[]", "JSON list"),
        ("{}", 'no "weight_map"'),
        ('{"weight_map": {}}', 'no "weight_map"'),
        ('{"weight_map": ["a"]}', 'no "weight_map"'),
        ('{"weight_map": {"a": 7}}', "only .safetensors files are read"),
        ('{"weight_map": {"a": null}}', "only .safetensors files are read"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "only .safetensors files are read"),
        (f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}', "'a' is given twice"),
    ],
)
@pytest.mark.fault("an unusable index")
def test_malformed_index(two_shards, index, message, refusal):
    (two_shards / INDEX).write_text(index)
    line = refusal(two_shards)
    assert message in line and INDEX in line


@pytest.mark.parametrize(
    "shard",
    [
        "/etc/x.safetensors",
        "../x.safetensors",
        "..",
        "sub/x.safetensors",
        "./" + FIRST,
        "sub/../x.safetensors",
        "C:\\x.safetensors",
        "C:x.safetensors",
        "..\\x.safetensors",
        "\\\\host\\share\\x.safetensors",
        "x\0.safetensors",
        "x\n.safetensors",
        ".safetensors/",
        "",
    ],
)
@pytest.mark.fault("an index that points out of the folder")
def test_index_that_points_elsewhere(two_shards, shard, refusal):
    save_file({"a": torch.ones(1)}, two_shards.parent / "x.safetensors")  # what a traversal would find
    (two_shards / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    refusal(two_shards)


@pytest.mark.fault("a link out of the folder")
def test_links_out_of_the_folder(two_shards, refusal):
    outside = two_shards.parent / "outside.safetensors"
    (two_shards / SECOND).rename(outside)
    (two_shards / SECOND).symlink_to(outside)
    line = refusal(two_shards)
    assert SECOND in line and "link out of its folder" in line
    (two_shards / SECOND).unlink()
    (two_shards / SECOND).symlink_to(two_shards / "gone")
    assert "leads nowhere" in refusal(two_shards)
    (two_shards / SECOND).unlink()
    (two_shards / SECOND).symlink_to(SECOND)
    assert "leads nowhere" in refusal(two_shards)
    (two_shards / SECOND).unlink()
    outside.rename(two_shards / "inside.safetensors")
    (two_shards / SECOND).symlink_to("inside.safetensors")
    assert open_checkpoint(two_shards).load("c").sum() == 7


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.fault("a link out of the folder")
def test_links_out_of_the_folder_for_json(two_shards, name, refusal):
    (two_shards / name).rename(two_shards.parent / name)
    (two_shards / name).symlink_to(two_shards.parent / name)
    assert "link out of its folder" in refusal(two_shards)


@pytest.mark.fault("a pipe in a file's place")
def test_a_fifo_is_refused_and_not_waited_for(two_shards, refusal):
    (two_shards / SECOND).unlink()
    os.mkfifo(two_shards / SECOND)
    assert "not a regular file" in refusal(two_shards)


@pytest.mark.fault("a missing shard")
def test_missing_shard(two_shards, refusal):
    (two_shards / SECOND).unlink()
    line = refusal(two_shards)
    assert f"{SECOND} is missing" in line and INDEX in line


@pytest.mark.fault("a missing, doubled or changed tensor")
def test_index_and_headers_disagree(two_shards, refusal):
    index = {"a": FIRST, "b": FIRST, "c": SECOND}
    (two_shards / INDEX).write_text(json.dumps({"weight_map": index | {"d": SECOND}}))
    assert f"{SECOND} lacks tensor 'd'" in refusal(two_shards)
    (two_shards / INDEX).write_text(json.dumps({"weight_map": {"a": FIRST, "c": SECOND}}))
    assert f"{FIRST} holds tensor 'b', which {INDEX} does not list" in refusal(two_shards)
    (two_shards / INDEX).write_text(json.dumps({"weight_map": index}))
    save_file({"c": torch.ones(1), "a": torch.ones(1)}, two_shards / SECOND)
    line = refusal(two_shards)
    assert FIRST in line and SECOND in line and "both hold tensor 'a'" in line


def test_hostile_names_in_a_damaged_header_are_not_printed_raw(two_shards, refusal):
    (two_shards / SECOND).write_bytes(shard_bytes({"\x1b[31mevil": f32(4, 8)}))
    assert "\x1b" not in refusal(two_shards)


@pytest.mark.fault("a truncated shard")
def test_truncation_at_every_byte(two_shards, refusal):
    """Cut anywhere (in the length, the header, the data, before the last byte): refused when opened, and named."""
    whole = (two_shards / SECOND).read_bytes()
    for size in range(len(whole)):
        (two_shards / SECOND).write_bytes(whole[:size])
        line = refusal(two_shards)
        assert SECOND in line and any(word in line for word in ("truncated", "empty")), (size, line)
    (two_shards / SECOND).write_bytes(whole)
    assert open_checkpoint(two_shards).load("c").sum() == 7


@pytest.mark.fault("bytes behind the end of a shard")
def test_bytes_behind_the_end(two_shards, refusal):
    with (two_shards / SECOND).open("ab") as file:
        file.write(b"\0")
    assert "damaged" in refusal(two_shards)


def shard_bytes(header: object, data: bytes = bytes(8)) -> bytes:
    text = (header if isinstance(header, bytes) else json.dumps(header).encode()) + b"  "
    return struct.pack("<Q", len(text)) + text + data


def f32(begin: int, end: int, shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<Q", 1 << 40) + bytes(100), "claims a header of"),
        (struct.pack("<Q", (1 << 64) - 1) + bytes(100), "claims a header of"),
        (struct.pack("<Q", 99_000_000) + bytes(100), "truncated"),
        (struct.pack("<Q", 0) + bytes(100), "damaged"),
        (shard_bytes({"c": f32(0, 8), "d": f32(4, 8)}), "damaged"),  # overlap
        (shard_bytes({"c": f32(4, 8)}), "damaged"),  # hole
        (shard_bytes({"c": f32(8, 0)}), "damaged"),
        (shard_bytes({"c": f32(0, 8, [-2])}), "damaged"),
        (shard_bytes({"c": f32(0, 8, [1 << 62, 1 << 62])}), "damaged"),
        (shard_bytes({"c": f32(0, 8, [3])}), "damaged"),
        (shard_bytes({"c": {**f32(0, 8), "dtype": "F77"}}), "damaged"),
        (shard_bytes({"c": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}), "dtype F4, which is not read"),
        (shard_bytes({"c": ["F32", [2], [0, 8]]}), "damaged"),
        (shard_bytes(b'{"c": {}, "c": {}}'), "damaged"),
        (
            shard_bytes(
                json.dumps({"c": f32(0, 8)}).encode()[:-1] + b', "c": ' + json.dumps(f32(0, 8)).encode() + b"}"
            ),
            "twi",
        ),
        (shard_bytes([1]), "damaged"),
        (shard_bytes(b"\xff\xff"), "damaged"),
        (shard_bytes(b"[" * 100_000), "damaged"),
        (b"PK\x03\x04" + bytes(200), "claims a header of|damaged|truncated"),  # a pickle in a zip under another name
    ],
)
@pytest.mark.fault("a damaged or hostile header")
def test_damaged_headers(two_shards, content, message, refusal):
    (two_shards / SECOND).write_bytes(content)
    line = refusal(two_shards)
    assert SECOND in line and any(part in line for part in message.split("|"))


def test_a_long_name_or_one_with_a_newline_stays_on_one_line(two_shards, refusal):
    (two_shards / SECOND).write_bytes(save({"c": torch.ones(1), "evil\n\x1b[31m": torch.ones(1)}))
    line = refusal(two_shards)
    assert "\x1b" not in line and "\\n" in line


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux shows them")
def test_open_files_are_closed_after_a_refusal(two_shards):
    (two_shards / INDEX).write_text(json.dumps({"weight_map": {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}}))
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept = []  # an exception keeps the frames it went through, and so whatever they opened
    for _ in range(20):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(two_shards)
        kept.append(caught)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before

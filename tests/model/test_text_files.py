"""Files are known by what they hold: each kind as people have it is read as it is meant, or refused in one line."""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import lzma

import pytest
import torch

from sarqc.errors import ArgumentError, SarqcError, TextError
from sarqc.model.calibration_data import read_text, windows
from tests.support import tiny

TEXTS = ["One text about names, with a line\nend.", "Another — about bindings.", "A third one. " * 30]
TEMPLATE = "{% for m in messages %}<end>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
CHAT = [{"role": "user", "content": "What is a name"}, {"role": "assistant", "content": "A binding. " * 20}]
SHARED = [{"from": "human", "value": CHAT[0]["content"]}, {"from": "gpt", "value": CHAT[1]["content"]}]
TASK = {"instruction": "What", "input": "", "output": "A binding. " * 20}
PLAIN = "\n".join(TEXTS)


def lines(rows):
    return "\n".join(map(json.dumps, rows))


ROWS = lines({"text": text, "id": 3} for text in TEXTS)


@pytest.fixture
def file(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", PLAIN),
        ("no_suffix", PLAIN),
        ("windows.txt", PLAIN.replace("\n", "\r\n")),
        ("mark.txt", b"\xef\xbb\xbf" + PLAIN.encode()),
        ("utf16.txt", PLAIN.encode("utf-16")),
        ("t.txt.gz", gzip.compress(PLAIN.encode(), mtime=0)),
        ("named_wrongly.txt", gzip.compress(PLAIN.encode(), mtime=0)),
        ("t.bz2", bz2.compress(PLAIN.encode())),
        ("t.xz", lzma.compress(PLAIN.encode())),
        ("a.jsonl", ROWS),
        ("blank_lines.jsonl", ROWS.replace("\n", "\n\n  \n")),
        ("mark.jsonl", b"\xef\xbb\xbf" + ROWS.encode()),
        ("CAPITALS.JSONL", ROWS),
        ("a.ndjson", ROWS),
        ("json_lines.txt", ROWS),
        ("rows.jsonl.gz", gzip.compress(ROWS.encode(), mtime=0)),
        ("texts.jsonl", lines(TEXTS)),
        ("list.json", json.dumps([{"text": text} for text in TEXTS], indent=1)),
        ("list.txt", json.dumps(TEXTS)),
    ],
)
def test_text_is_the_same_however_it_is_kept(file, name, content):
    assert read_text(file(name, content), "calibration") == PLAIN


def test_rows_without_a_text_are_passed_over(file):
    assert read_text(file("a.jsonl", lines([{"text": None}, {"text": "a"}, {"text": None}])), "calibration") == "\na\n"


@pytest.mark.parametrize(
    "text", ["[a link](x)\n{}\n[1]", '{"text": 1} is JSON\nand this is not', "[1, 2", "{", "[1]\n[2]"]
)
def test_text_that_begins_like_json_is_text(file, text):
    assert read_text(file("a.md", text), "calibration") == text


def test_conversations_and_columns_of_a_file(file):
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = TEMPLATE

    def tokens(rows, **how):
        return windows(file("a.txt", lines(rows)), lambda: tokenizer, 32, **how).tokens

    expected = windows([CHAT] * 3, lambda: tokenizer, 32).tokens
    assert torch.equal(tokens([{"messages": CHAT}] * 3), expected)
    assert torch.equal(tokens([{"conversations": SHARED}] * 3), expected)
    with pytest.raises(ArgumentError, match=r"keys instruction, input, output.*--column output"):
        tokens([TASK])
    given = windows([TASK["output"]] * 3, lambda: tokenizer, 32).tokens
    assert torch.equal(tokens([TASK] * 3, column="output"), given)
    with pytest.raises(ArgumentError, match=r"column = 'answer' is not in the data: use one of instruction"):
        tokens([TASK], column="answer")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.txt", b"\x08\0\0\0\0\0\0\0{}      ", "is a binary file"),
        ("noise.bin", bytes(range(256)) * 100, "is a binary file"),
        ("nul.txt", b"text" * 1000 + bytes(1000), "is a binary file"),
        ("latin1.txt", "garçon".encode("latin1"), "is not UTF-8.*iconv"),
        ("cut.gz", gzip.compress(PLAIN.encode() * 50, mtime=0)[:60], "cannot be read"),
        ("text.zst", b"\x28\xb5\x2f\xfd1234", "zstd -d"),
        ("table.csv", "text\na\n", "is a table"),
        ("one.json", '{"a": [\n1]}', "no list of rows"),
        ("cut.jsonl", ROWS[:-9], "line 3 is not JSON"),
        ("other.jsonl", '{"text": "a"}\n3', "holds a int"),
        ("data.parquet", b"PAR1" + bytes(200) + b"PAR1", "Parquet file"),
    ],
)
def test_what_is_not_read_is_one_line(file, name, content, message):
    with pytest.raises(SarqcError, match=message) as caught:
        read_text(file(name, content), "calibration")
    assert "\n" not in str(caught.value)


def test_what_is_beyond_the_limit_is_left_out(file, monkeypatch):
    monkeypatch.setattr("sarqc.model.dataset.MOST_TEXT", len(ROWS) - 5)
    assert read_text(file("a.jsonl", ROWS), "calibration") == "\n".join(TEXTS[:2])


@pytest.mark.parametrize("name", ["list.json", "list.txt"])
def test_a_list_beyond_the_limit_is_refused(file, monkeypatch, name):
    monkeypatch.setattr("sarqc.model.dataset.MOST_TEXT", 40)
    with pytest.raises(TextError, match=r"more than 40 characters.*jq"):
        read_text(file(name, json.dumps([{"text": text} for text in TEXTS], indent=1)), "calibration")
    assert read_text(file("text.txt", "[a link](x) " * 9), "calibration") == ("[a link](x) " * 9)[:40]


def test_damage_inside_a_parquet_file_is_one_line(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "data"
    parquet.write_table(pyarrow.table({"text": TEXTS * 2}), path, row_group_size=3, use_dictionary=False)
    start = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 60] = b"\xff" * 60
    path.write_bytes(content)
    with pytest.raises(TextError, match="Parquet file that cannot be read"):
        read_text(str(path), "calibration")


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "data"
    parquet.write_table(pyarrow.table({"id": list(range(3)), "text": TEXTS}), path)
    assert read_text(str(path), "calibration") == PLAIN


def test_a_file_that_is_not_there_is_no_data_set():
    with pytest.raises(TextError, match="no such file"):
        read_text("nowhere.NDJSON", "calibration")

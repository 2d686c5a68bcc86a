"""Calibration data in every form that Python has it in becomes the same sequences as by hand, or one line of error."""

from __future__ import annotations

import copy

import pytest
import torch

from sarqc.errors import ArgumentError, ModelError, TextError
from sarqc.model.calibration_data import counts_at_once, windows
from sarqc.model.dataset import GIVEN, GIVEN_CHATS, GIVEN_TEXTS
from tests.support import tiny

TEMPLATE = "{% for m in messages %}<end>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
CHAT = [{"role": "user", "content": "What is a name"}, {"role": "assistant", "content": "A binding. " * 40}]


class Rows:
    """As a `datasets.Dataset`: rows are dicts, and there is more to it than an iterator."""

    def __init__(self, rows):
        self.rows = rows
        self.column_names = list(rows[0])

    def __iter__(self):
        return iter(self.rows)


def tokenizer(template=TEMPLATE):
    made = copy.deepcopy(tiny.tokenizer())  # which other tests share
    made.chat_template = template
    return made


def read(data, seqlen=32, template=TEMPLATE):
    return windows(data, lambda: tokenizer(template), seqlen)


def none():
    raise AssertionError("no tokenizer is needed")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One text about names.\nAnother about bindings.\n" * 30)
    return path


def test_texts_are_the_text_of_all_of_them(text):
    lines = text.read_text().splitlines()
    expected = read(text)
    for data in (
        lines,
        tuple(lines),
        iter(lines),
        Rows([{"text": line} for line in lines]),
        [{"text": x} for x in lines],
    ):
        records = read(data)
        assert torch.equal(records.tokens, expected.tokens) and records.text == GIVEN_TEXTS


def test_conversations_go_through_the_template():
    own = tokenizer()
    expected = own(own.apply_chat_template(CHAT, tokenize=False), add_special_tokens=False)["input_ids"] * 3
    for data in (
        [CHAT] * 3,
        [{"messages": CHAT}] * 3,
        Rows([{"messages": CHAT, "source": "x"}] * 3),
        Rows([{"conversations": CHAT}] * 3),
    ):
        records = read(data)
        assert records.tokens.flatten().tolist() == expected[: len(expected) // 32 * 32]
        assert (records.bos, records.text) == (False, GIVEN_CHATS)


def test_conversations_with_images_are_refused():
    part = {"type": "image", "url": "cat.png"}
    with pytest.raises(ArgumentError, match=r"dataset .*'image'"):
        read([[{"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}]] * 3)


def test_token_ids_need_no_tokenizer():
    tokens = torch.arange(70, dtype=torch.int64)
    assert torch.equal(windows(tokens.view(2, 35), none, 32).tokens, tokens.view(2, 35))
    for data in (
        [tokens.tolist()],
        [tokens[:5].tolist(), tokens[5:].tolist()],
        [tokens],
        [{"input_ids": tokens.tolist()}],
    ):
        drawn = windows(data, none, 32)
        assert torch.equal(drawn.tokens, tokens[:64].view(2, 32)) and drawn.text == GIVEN


@pytest.mark.parametrize(
    ("data", "family", "message"),
    [
        ([], TextError, "dataset is empty"),
        ([""], TextError, "empty"),
        (["short"], TextError, "too short"),
        ([[1, 2, 3]], TextError, "dataset is too short: its 3 tokens"),
        ({"text": ["a"]}, ArgumentError, "dataset holds a dict with the keys text"),
        ([{"prompt": "a"}], ArgumentError, "dataset holds a dict with the keys prompt"),
        ([3.5], ArgumentError, "dataset holds a float"),
        ([object()], ArgumentError, "dataset holds a object"),
        (["a text", 3], ArgumentError, "dataset holds a int"),
        ([CHAT, "a text"], ArgumentError, "dataset holds a str"),
        ([[1, 2], ["a"]], ArgumentError, "dataset holds a list"),
        (torch.zeros(3), ArgumentError, "int64"),
        (object(), ArgumentError, "dataset holds a object"),
    ],
)
def test_what_is_not_read_is_one_line(data, family, message):
    with pytest.raises(family, match=message) as caught:
        read(data)
    assert "\n" not in str(caught.value)


def test_conversations_without_a_template_are_refused():
    with pytest.raises(ModelError, match="no chat template"):
        read([CHAT], template=None)
    with pytest.raises(ModelError, match="the chat template does not take the conversation"):
        read([CHAT], template="{{ raise_exception('user first') }}")


def test_real_data_sets():
    datasets = pytest.importorskip("datasets")
    lines = ["One text about names and bindings, and what they stand for."] * 40
    assert torch.equal(read(datasets.Dataset.from_dict({"text": lines})).tokens, read(lines).tokens)
    chats = datasets.Dataset.from_list([{"messages": CHAT}] * 2)
    assert torch.equal(read(chats).tokens, read([CHAT] * 2).tokens)


def test_what_is_counted_at_once():
    assert counts_at_once(["a"]) and counts_at_once("builtin") and not counts_at_once("owner/name")

"""A conversation: streamed as `generate` would say it, with a history, in a terminal or a pipe."""

from __future__ import annotations

import io
import sys

import pytest
import torch

import sarqc
from sarqc.cli.chat import chat as command
from sarqc.entrypoints.generate import Chat, open_chat
from sarqc.errors import ArgumentError
from tests.support import tiny

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    source = tiny.save("llama", tmp_path_factory.mktemp("chat") / "source")
    return sarqc.quantize(source, source.parent / "out", method="rtn", group_size=32).out


@pytest.fixture
def loaded(folder):
    return sarqc.load(folder, dtype="float32")


def said_by_generate(model, tokenizer, text, count):
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_two_turns_are_what_generate_says(loaded, template, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(tokenizer, "chat_template", template)
    chat = Chat(model, tokenizer, max_new_tokens=12)
    first = "".join(chat.say("The garden"))
    second = "".join(chat.say("and then"))
    if template is None:
        texts = "The garden", f"The garden{first}\nand then"
    else:
        one = f"[user] The garden\n[assistant] {first}\n"
        texts = "[user] The garden\n[assistant] ", f"{one}[user] and then\n[assistant] "
    assert [first, second] == [said_by_generate(model, tokenizer, text, 12) for text in texts]
    assert [turn["content"] for turn in chat.turns] == ["The garden", first, "and then", second]
    chat.reset()
    assert "".join(chat.say("The garden")) == first


def test_what_goes_on_is_read_from_where_it_stopped(loaded, monkeypatch):
    """Also where a turn was cut short by the user: the keys and values then stand for fewer tokens."""
    model, tokenizer = loaded
    chat = Chat(model, tokenizer, max_new_tokens=8)
    read, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **how: read.append(how["input_ids"].shape[1]) or forward(**how))
    answer = chat.say("The garden")
    start = next(answer)
    answer.close()
    assert chat.turns[-1] == {"role": "assistant", "content": start} and start
    read.clear()
    rest = "".join(chat.say("x"))
    whole = f"The garden{start}\nx"
    assert read[0] < len(tokenizer(whole).input_ids) and set(read[1:]) <= {1}
    assert rest == said_by_generate(model, tokenizer, whole, 8)


def test_draws_depend_on_the_seed_alone(loaded):
    model, tokenizer = loaded
    before = torch.get_rng_state()
    answers = [
        "".join(Chat(model, tokenizer, temperature=1.5, seed=seed, max_new_tokens=12).say("The garden"))
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_text_that_is_too_long_leaves_the_history_alone(loaded):
    chat = Chat(*loaded, max_new_tokens=4)
    "".join(chat.say("The garden"))
    turns = list(chat.turns)
    with pytest.raises(ArgumentError, match="takes 1 to 256; begin anew with /reset"):
        "".join(chat.say("word " * 300))
    assert chat.turns == turns
    assert "".join(chat.say("on")) is not None and len(chat.turns) == 4


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"max_new_tokens": 0}, {"seed": -1}]
)
def test_options_out_of_range_are_refused_before_the_model_is_loaded(wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        open_chat("/nowhere", **wrong)


def run(folder, monkeypatch, capsys, stdin):
    monkeypatch.setattr(sys, "stdin", stdin)
    command(str(folder), max_new_tokens=6, dtype="float32")
    return capsys.readouterr()


def test_lines_of_a_pipe_are_answered_one_by_one(folder, loaded, monkeypatch, capsys):
    lines = io.StringIO("The garden\n\n/reset\n/what is this\nThe garden\n/quit\nunheard\n")
    shown = run(folder, monkeypatch, capsys, lines)
    answer = said_by_generate(*loaded, "The garden", 6)
    assert shown.out == f"{answer}\n{answer}\n"
    assert "/what is no command" in " ".join(shown.err.split())


def test_bytes_that_are_no_text_are_answered_too(folder, monkeypatch, capsys):
    piped = io.TextIOWrapper(io.BytesIO(b"The \xff\xfe garden\n"), encoding="utf-8")
    assert run(folder, monkeypatch, capsys, piped).out.strip()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_stops_an_answer_and_not_the_conversation(folder, loaded, monkeypatch, capsys):
    """Ctrl-C while waiting, then while an answer comes; then a question, then Ctrl-D."""
    typed = iter([KeyboardInterrupt, "The garden", "The garden", EOFError])

    def read(prompt):
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    say, calls = Chat.say, []

    def interrupted_once(self, text):
        calls.append(text)
        for piece in say(self, text):
            yield piece
            if len(calls) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "say", interrupted_once)
    shown = run(folder, monkeypatch, capsys, Terminal())
    first, second, *_ = shown.out.split("\n")
    answer = said_by_generate(*loaded, "The garden", 6)
    assert answer.startswith(first) and first != answer
    assert second == said_by_generate(*loaded, f"The garden{first}\nThe garden", 6)
    words = " ".join(shown.err.split())
    assert "no chat template" in words and words.count("/reset forgets") == 2 and "6 tokens," in words

import sys
from types import SimpleNamespace

import pytest
import torch

from sarqc.errors import ArgumentError, ModelError, TextError
from sarqc.model import dataset
from sarqc.model.calibration_data import read_text, windows
from sarqc.model.dataset import Windows, builtin_text
from sarqc.model.tokenizer import check_tokens
from tests.support import tiny


def test_builtin_parts_share_no_topic():
    from pydoc_data.topics import topics

    calibration, evaluation = builtin_text("calibration"), builtin_text("evaluation")
    inside = {name: (text in calibration, text in evaluation) for name, text in topics.items() if len(text) > 200}
    assert all(a != b for a, b in inside.values())
    assert len(evaluation) > len(calibration) / 10 > 1000


def test_windows_are_the_text_in_order():
    tokenizer = tiny.tokenizer()
    drawn = windows("builtin", lambda: tokenizer, 32, part="evaluation")
    everything = tokenizer(builtin_text("evaluation"))["input_ids"]
    assert drawn.tokens.flatten().tolist() == everything[: drawn.tokens.numel()]
    assert drawn.available == len(drawn.tokens) == len(everything) // 32 and not drawn.bos


def test_a_tokenizer_that_begins_texts_begins_every_window():
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = type(tiny.tokenizer().backend_tokenizer).from_str(tiny.tokenizer().backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    drawn = windows("builtin", lambda: PreTrainedTokenizerFast(tokenizer_object=backend), 20, part="evaluation")
    plain = windows("builtin", tiny.tokenizer, 19, part="evaluation")
    assert drawn.bos and (drawn.tokens[:, 0] == 0).all()
    assert torch.equal(drawn.tokens[:, 1:], plain.tokens)


def test_drawing_is_by_seed_and_in_order_of_the_text():
    all_windows = Windows.of_tokens(torch.arange(400).view(100, 4))
    first, again, other = all_windows.draw(10, 3), all_windows.draw(10, 3), all_windows.draw(10, 4)
    assert torch.equal(first.tokens, again.tokens) and first.fingerprint == again.fingerprint
    assert not torch.equal(first.tokens, other.tokens) and first.fingerprint != other.fingerprint
    assert (first.tokens[1:, 0] > first.tokens[:-1, 0]).all()
    assert first.available == 100 and first.record()["windows"] == 10


def test_last_takes_the_end():
    assert Windows.of_tokens(torch.arange(40).view(10, 4)).last(2).tokens.tolist() == [
        [32, 33, 34, 35],
        [36, 37, 38, 39],
    ]


def test_too_little_text_says_how_much_there_is(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("a few words")
    with pytest.raises(TextError, match=r"short\.txt.*too short.*512"):
        windows(str(path), tiny.tokenizer, 512)
    with pytest.raises(TextError, match="num_samples = 11 is more than the 10 sequences of 4 tokens"):
        Windows.of_tokens(torch.arange(40).view(10, 4)).draw(11, 0)


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_empty_text_is_refused(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(TextError, match="empty"):
        windows(str(path), tiny.tokenizer, 32)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "noise.txt"
    path.write_bytes(b"gar\xe7on \x9d")
    with pytest.raises(TextError, match="UTF-8"):
        read_text(str(path), "calibration")


@pytest.mark.parametrize("name", ["nowhere.txt", "./nowhere", "/nowhere/at/all"])
def test_a_path_to_nothing_is_not_taken_for_a_data_set(name):
    with pytest.raises(TextError, match="no such file"):
        read_text(name, "calibration")


@pytest.mark.parametrize(
    "tokens", [torch.zeros(4, dtype=torch.int64), torch.zeros(2, 4), torch.zeros(0, 4, dtype=torch.int64)]
)
def test_tokens_of_another_shape_or_kind_are_refused(tokens):
    with pytest.raises(ArgumentError, match=r"int64 \[windows, seqlen\]"):
        Windows.of_tokens(tokens)


def test_a_long_text_is_made_tokens_in_stretches_of_whole_lines_up_to_a_limit(tmp_path, monkeypatch):
    """What the tokenizer is given at a time does not grow with the text, and what is looked at of it has an end."""
    path = tmp_path / "long.txt"
    path.write_text("".join(f"line {number} of many\n" for number in range(400)))
    given, plain = [], tiny.tokenizer()
    whole = windows(str(path), lambda: plain, 16)
    monkeypatch.setattr(dataset, "STRETCH", 100)
    assert torch.equal(windows(str(path), lambda: plain, 16).tokens, whole.tokens)
    monkeypatch.setattr(dataset, "WHOLE", 1000)
    encode = dataset.encode
    monkeypatch.setattr(dataset, "encode", lambda t, text, **how: given.append(text) or encode(t, text, **how))
    cut = windows(str(path), lambda: plain, 16)
    stretches = [text for text in given if "line" in text]
    assert "".join(stretches) == path.read_text() and len(stretches) > 50
    assert all(len(text) <= 100 and text.endswith("\n") for text in stretches)
    assert plain.decode(cut.tokens.flatten()) == plain.decode(whole.tokens.flatten())
    monkeypatch.setattr(dataset, "MOST_TEXT", 1000)
    assert read_text(str(path), "calibration") == path.read_text()[:1000]
    assert cut.record()["characters"] == len(path.read_text())
    assert windows(str(path), lambda: plain, 16).record()["characters"] == 1000


def test_a_line_longer_than_a_stretch_is_cut(monkeypatch):
    monkeypatch.setattr(dataset, "STRETCH", 4)
    assert list(dataset._stretches("abcdefg\nhi\nj")) == ["abcdefg\nhi\nj"]
    monkeypatch.setattr(dataset, "WHOLE", 4)
    assert list(dataset._stretches("abcdefg\nhi\nj")) == ["abcd", "efg\n", "hi\nj"]


def test_a_data_set_may_have_a_slice_as_its_split_and_rows_without_text(monkeypatch):
    asked = []

    def load_dataset(*args, **how):
        asked.append((*args, how["split"]))
        return [{"text": "a"}, {"text": None}, {"text": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_text("owner/set:en:train[:1000]", "calibration") == "a\n\nb"
    assert asked == [("owner/set", "en", "train[:1000]")]


def test_tokens_below_zero_are_refused():
    model = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(num_embeddings=10))
    with pytest.raises(ModelError, match=r"token -100: tokens are numbers from 0 up"):
        check_tokens(torch.tensor([[1, -100]]), model)

import pytest
import torch

from sarqc.errors import ArgumentError, TextError
from sarqc.model.calibration import Windows, builtin_text, read_text, windows
from tests.support import tiny


def test_builtin_parts_share_no_topic():
    from pydoc_data.topics import topics

    calibration, evaluation = builtin_text("calibration"), builtin_text("evaluation")
    inside = {name: (text in calibration, text in evaluation) for name, text in topics.items() if len(text) > 200}
    assert all(a != b for a, b in inside.values())
    assert len(evaluation) > len(calibration) / 10 > 1000


def test_windows_are_the_text_in_order():
    tokenizer = tiny.tokenizer()
    found = windows("builtin", tokenizer, part="evaluation", seqlen=32)
    everything = tokenizer(builtin_text("evaluation"))["input_ids"]
    assert found.tokens.flatten().tolist() == everything[: found.tokens.numel()]
    assert found.available == len(found.tokens) == len(everything) // 32 and not found.bos


def test_a_tokenizer_that_begins_texts_begins_every_window():
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = type(tiny.tokenizer().backend_tokenizer).from_str(tiny.tokenizer().backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    found = windows("builtin", PreTrainedTokenizerFast(tokenizer_object=backend), part="evaluation", seqlen=20)
    plain = windows("builtin", tiny.tokenizer(), part="evaluation", seqlen=19)
    assert found.bos and (found.tokens[:, 0] == 0).all()
    assert torch.equal(found.tokens[:, 1:], plain.tokens)


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
        windows(str(path), tiny.tokenizer(), part="calibration", seqlen=512)
    with pytest.raises(TextError, match="10 windows of 4 tokens, 11 asked for"):
        Windows.of_tokens(torch.arange(40).view(10, 4)).draw(11, 0)


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_empty_text_is_refused(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(TextError, match="empty"):
        windows(str(path), tiny.tokenizer(), part="calibration", seqlen=32)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "noise.txt"
    path.write_bytes(b"\xff\xfe\x00\x9d")
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

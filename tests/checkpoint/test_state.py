"""Files of a work folder that are written and read piece by piece."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from sarqc.checkpoint import shards
from sarqc.checkpoint.state import ChunkedTensor, State, write_state
from sarqc.errors import CheckpointError, ResourceError


def in_parts(tensor, lengths):
    """A tensor in pieces of these lengths, each overwritten once the next one is asked for; counts how often."""
    asked = []

    def each():
        asked.append(tensor)
        start = 0
        for length in lengths:
            part = tensor[start : start + length].clone()
            yield part
            part.zero_()
            start += length

    return ChunkedTensor(tuple(tensor.shape), tensor.dtype, each), asked


@pytest.fixture
def hidden(generator):
    return torch.randn(7, 5, 3, generator=generator).bfloat16()


def test_a_tensor_in_pieces_makes_the_file_of_the_whole_one(hidden, tmp_path):
    parts, asked = in_parts(hidden, [3, 1, 3])
    write_state(tmp_path / "parts", {"hidden": parts, "a": torch.arange(3)}, {"block": 1})
    write_state(tmp_path / "whole", {"hidden": hidden, "a": torch.arange(3)}, {"block": 1})
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert len(asked) == 1
    assert torch.equal(load_file(tmp_path / "parts")["hidden"], hidden)


@pytest.mark.parametrize("piece", [1, 31, 10**6])
def test_pieces_that_are_read_are_the_whole(hidden, tmp_path, monkeypatch, piece):
    monkeypatch.setattr(shards, "_PART", piece)
    tensors = {"hidden": hidden, "scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}
    write_state(tmp_path / "file", tensors, {})
    with State(tmp_path / "file") as state:
        parts = state.parts("hidden")
        result = list(parts.each())
        assert torch.equal(torch.cat(result), hidden) and (parts.shape, parts.dtype) == (hidden.shape, hidden.dtype)
        assert len(result) == {1: 7, 31: 7, 10**6: 1}[piece]
        assert all(torch.equal(row, own) for row, own in zip(parts.rows(), hidden, strict=True))
        for name in ("scalar", "empty"):
            assert torch.equal(next(state.parts(name).each()), tensors[name])
        state.check()


def test_a_flipped_bit_is_found_behind_the_last_piece(hidden, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_PART", 1)
    path = tmp_path / "file"
    write_state(path, {"hidden": hidden}, {})
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with State(path) as state:
        with pytest.raises(CheckpointError, match="'hidden' does not match its sum"):
            list(state.parts("hidden").each())
        with pytest.raises(CheckpointError, match="'hidden' does not match its sum"):
            state.check()


@pytest.mark.parametrize(
    ("error", "message"),
    [(OSError(28, "No space left on device"), "No space left"), (ResourceError("a rank ended"), "^a rank ended$")],
)
def test_pieces_that_fail_leave_what_was_there(hidden, tmp_path, error, message):
    path = tmp_path / "file"
    write_state(path, {"hidden": hidden}, {})
    before = path.read_bytes()

    def failing():
        yield hidden[:2]
        raise error

    with pytest.raises(ResourceError, match=message):
        write_state(path, {"hidden": ChunkedTensor(tuple(hidden.shape), hidden.dtype, failing)}, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

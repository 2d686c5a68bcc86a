"""Tensors in messages: every element arrives, whatever its dtype and place in memory, and little memory is taken."""

from __future__ import annotations

import pytest
import torch

from sarqc.method.gram import Gram
from sarqc.pipeline.messages import messages

ROOM = 1 << 12


def kinds(generator: torch.Generator) -> list[torch.Tensor]:
    wide = torch.randn(3, 40, 50, generator=generator)
    return [
        torch.randint(0, 16, (3, 7), generator=generator, dtype=torch.uint8),
        torch.randn(5, 3, generator=generator).bfloat16(),
        wide[:, 10:20, :30],
        torch.randn(90, 70, generator=generator),
        torch.randint(0, 9, (4,), generator=generator),
        torch.empty(0, 8),
        wide.mT[1],
    ]


def test_every_element_travels_between_tensors_that_lie_otherwise(generator):
    sent = kinds(generator)
    received = [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in sent]
    one, other = (torch.empty(ROOM, dtype=torch.uint8) for _ in range(2))
    count = 0
    for here, there in zip(messages(sent, one), messages(received, other), strict=True):
        here.pack()
        assert here.content.shape == there.content.shape and here.content.nbytes <= ROOM
        there.content.copy_(here.content)
        there.unpack()
        count += 1
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(sent, received))
    assert count < 20  # 25 kB of the largest in halves that fit, and the rest together


def test_small_tensors_share_a_message_and_a_large_one_in_one_piece_is_not_copied(generator):
    small = [torch.randn(4, generator=generator) for _ in range(50)]
    assert len(list(messages(small, torch.empty(ROOM, dtype=torch.uint8)))) == 1
    large = torch.randn(ROOM // 4, generator=generator)
    (only,) = messages([large], torch.empty(ROOM, dtype=torch.uint8))
    assert only.content.data_ptr() == large.data_ptr()


@pytest.mark.parametrize("inputs", [1, 100, 200, 1000])
def test_of_a_gram_the_lower_triangle_travels_whole(inputs, generator):
    gram = Gram.zeros(2, inputs)
    gram.sum += 1
    for tensor in gram.tensors():
        tensor.zero_()
    assert not gram.sum.tril().any()
    assert gram.sum.mean() < 0.5 or inputs <= 200  # small ones are one strip, or two
    assert sum(tensor.numel() for tensor in gram.tensors()) <= 0.6 * gram.sum.numel() or inputs <= 200

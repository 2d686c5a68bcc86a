"""How far a quantized weight may be from the original, and when it is another weight."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sarqc.checkpoint.differences import LEAST_SHARE, WORST_ERROR, compare
from sarqc.method.weight import QuantizedWeight


def side(weight: Tensor, quantized: QuantizedWeight | None) -> SimpleNamespace:
    """A checkpoint of one Linear."""
    return SimpleNamespace(
        folder="here",
        names=lambda: ["a.weight"],
        linears=lambda: ["a"] if quantized else [],
        shape=lambda _: tuple(weight.shape),
        load=lambda _: weight,
        quantized=lambda _: quantized,
    )


def compared(weight: Tensor, values: Tensor):
    """What is said of a weight whose dequantized form is `values`, rounded to 8 bits."""
    scale = values.abs().max() / 127
    codes = (values / scale).round().clamp(-128, 127).add(128).to(torch.uint8)
    stored = QuantizedWeight(codes[None], scale.expand(1, len(codes), 1), torch.full((1, len(codes), 1), 128).byte(), 8)
    return compare(side(values, stored), side(weight, None), "a.weight", stored)


def test_a_weight_may_move_by_more_than_its_size_where_it_stays_in_it(generator):
    weight = torch.randn(64, 64, generator=generator)
    moved = weight + 1.5 * torch.randn(64, 64, generator=generator)
    message = compared(weight, moved)
    assert message.problem is None and message.error == pytest.approx(1.5, rel=0.05) and message.error > WORST_ERROR


@pytest.mark.parametrize("share", [-1.0, 0.0, 0.9 * LEAST_SHARE])
def test_a_weight_with_little_of_the_original_is_another_one(share, generator):
    weight, other = torch.randn(2, 64, 64, generator=generator)
    message = compared(weight, share * weight + 1.5 * other)
    assert message.error is None and "of its size away from the weight in here" in message.problem


def test_a_weight_in_another_order_is_another_one(generator):
    weight = torch.randn(64, 64, generator=generator)
    assert compared(weight, weight.roll(1, 0)).problem
    assert compared(weight, weight).problem is None

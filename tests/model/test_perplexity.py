import math
from types import SimpleNamespace

import pytest
import torch

from sarqc.errors import NumericError
from sarqc.model.dataset import Windows
from sarqc.model.perplexity import Tally, perplexity


class Fixed:
    """A model that gives every token of a vocabulary of 8 the logits it was made with."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def get_input_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(num_embeddings=8)

    def __call__(self, tokens: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*tokens.shape, 8))


WINDOWS = Windows.of_tokens(torch.arange(30).view(3, 10) % 8)


def test_knowing_nothing_is_the_size_of_the_vocabulary():
    measured = perplexity(Fixed(torch.zeros(8)), WINDOWS)
    assert measured.perplexity == pytest.approx(8) and measured.predicted == 27
    assert measured.nll == pytest.approx(27 * math.log(8))
    assert measured.protocol["stride"] == measured.protocol["seqlen"] == 10 and measured.protocol["tokens"] == 30


def test_progress_is_told_window_by_window():
    seen = []
    perplexity(Fixed(torch.zeros(8)), WINDOWS, on_window=lambda *call: seen.append(call))
    assert [call[:2] for call in seen] == [(1, 3), (2, 3), (3, 3)]


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(NumericError, match="window 1 of 3"):
        perplexity(Fixed(torch.full((8,), float("nan"))), WINDOWS)


def test_a_tally_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    reference = torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0]])
    tally = Tally()
    tally.add(logits, torch.tensor([0, 1]), reference)
    assert tally.nll == pytest.approx(math.log(2) + math.log(4))
    assert tally.perplexity == pytest.approx(math.sqrt(8))
    # P = (3/4, 1/4) against Q = (1/2, 1/2) once, and against itself once.
    assert tally.kl == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2)
    assert tally.agreement == 1.0  # of equal logits the first counts
    tally.add(logits.flip(1), torch.tensor([0, 0]), reference)
    assert tally.agreement == 0.75 and tally.predicted == 4


def test_a_tally_adds_nothing_that_is_not_finite():
    tally = Tally()
    for logits, reference in ((torch.full((1, 2), math.nan), None), (torch.zeros(1, 2), torch.full((1, 2), math.inf))):
        with pytest.raises(NumericError):
            tally.add(logits, torch.tensor([0]), reference)
    assert tally == Tally()

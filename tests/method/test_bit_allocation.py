"""BitAllocation within a budget: against every possible choice, and what the budget counts."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from sarqc.config import QuantConfig
from sarqc.errors import ArgumentError
from sarqc.method.bit_allocation import Unit, allocate, average_range, stored_bits

WIDTHS = (2, 3, 4, 8)


def random_units(seed, count=5):
    """Units whose losses fall by about four with each bit, as rounding's do."""
    generator = torch.Generator().manual_seed(seed)
    units = []
    for number in range(count):
        weights = 64 * int(torch.randint(1, 20, (1,), generator=generator))
        scale = float(torch.rand(1, generator=generator)) + 0.01
        wobble = torch.rand(len(WIDTHS), generator=generator) + 0.5
        losses = {width: scale * 4.0**-width * float(w) for width, w in zip(WIDTHS, wobble)}
        units.append(Unit(f"u{number}", weights, {width: width * weights for width in WIDTHS}, losses))
    return units


def best(units, average):
    """The least loss of all choices that the budget has room for."""
    budget = average * sum(unit.weights for unit in units)
    return min(
        sum(unit.losses[width] for unit, width in zip(units, widths))
        for widths in product(WIDTHS, repeat=len(units))
        if sum(unit.sizes[width] for unit, width in zip(units, widths)) <= budget
    )


def used(units, widths):
    return sum(unit.sizes[width] for unit, width in zip(units, widths)) / sum(unit.weights for unit in units)


@pytest.mark.parametrize("seed", range(8))
def test_nothing_beats_it_at_what_it_uses(seed):
    """Steps along the hulls are optimal at the size they add up to, and never over the budget."""
    units = random_units(seed)
    for average in (2.0, 2.7, 3.5, 5.0, 8.0):
        widths = allocate(units, average)
        loss = sum(unit.losses[width] for unit, width in zip(units, widths))
        assert used(units, widths) <= average
        wider = max(unit.weights for unit in units) * 6 / sum(unit.weights for unit in units)
        assert loss <= best(units, max(average - wider, 2.0)) * (1 + 1e-12)
    assert allocate(units, 2.0) == [2] * 5 and allocate(units, 8.0) == [8] * 5


def test_more_budget_is_never_worse():
    units = random_units(3, count=30)
    losses = [
        sum(unit.losses[width] for unit, width in zip(units, allocate(units, 2 + step / 10))) for step in range(40)
    ]
    assert all(after <= before for before, after in pairwise(losses)) and losses[-1] < losses[0] / 30


def test_equal_units_are_served_in_order():
    units = [Unit(name, 10, {2: 20, 3: 30}, {2: 1.0, 3: 0.1}) for name in "abc"]
    assert allocate(units, 2.7) == [3, 3, 2] and allocate(units, 2.7) == allocate(list(units), 2.7)


def test_bits_that_save_nothing_are_not_spent():
    dead = Unit("dead", 10, {2: 20, 4: 40}, {2: 0.0, 4: 0.0})
    live = Unit("live", 10, {2: 20, 4: 40}, {2: 1.0, 4: 0.1})
    assert allocate([dead, live], 4.0) == [2, 4]


def test_a_width_above_the_hull_is_passed_over():
    """3 bits are worse than what 2 and 4 bits make together, so they are a step on no way."""
    unit = Unit("bumpy", 10, {2: 20, 3: 30, 4: 40}, {2: 1.0, 3: 0.99, 4: 0.0})
    assert allocate([unit], 3.9) == [2] and allocate([unit], 4.0) == [4]


def test_widths_that_fill_the_same_words_cost_nothing():
    unit = Unit("thin", 8, {2: 32, 3: 32, 4: 32}, {2: 1.0, 3: 0.3, 4: 0.1})
    assert allocate([unit], 4.0) == [4]


def test_too_little_is_refused():
    with pytest.raises(ArgumentError, match=r"avg_bits = 1.9 is too small: the narrowest widths take 2.000"):
        allocate(random_units(0), 1.9)


@pytest.mark.parametrize("sym", [True, False])
def test_averages_count_scales_and_zeros(sym):
    quant = QuantConfig(group_size=32, sym=sym, avg_bits=4, bit_options=(2, 4))
    assert stored_bits((64, 96), 3, quant) == 64 * (96 * 3 + 3 * 16) + (0 if sym else 3 * 64 * 3)
    least, most = average_range([(64, 96)] * 3 + [(32, 64)], quant)
    zeros = 0 if sym else 2 / 32
    assert (least, most) == pytest.approx((2.5 + zeros, 4.5 + 2 * zeros))

"""Rows that would spoil a sum."""

from __future__ import annotations

import pytest
import torch

from sarqc.method.gram import LONGEST, finite_rows, row_scales

WINDOW = 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_may_be_as_long_as_two_medians_of_its_own_window(dtype, generator):
    x = torch.nn.functional.normalize(torch.randn(3 * WINDOW, 64, generator=generator), dim=-1)
    x[WINDOW : 2 * WINDOW] *= 100  # a window of long rows: none is longer than its neighbours
    x[0], x[2 * WINDOW + 3] = 1000 * x[0], 1.9 * x[2 * WINDOW + 3]
    x = x.to(dtype)
    factor = row_scales(x, WINDOW)
    assert factor.shape == (3 * WINDOW, 1) and factor.dtype == dtype
    assert (factor[1:] == 1).all()
    torch.testing.assert_close((x * factor).float().norm(dim=-1)[0], torch.tensor(LONGEST), rtol=0.01, atol=0)


def test_windows_do_not_know_of_each_other(generator):
    x = torch.randn(3 * WINDOW, 16, generator=generator).exp()
    parts = [row_scales(part, WINDOW) for part in x.split(WINDOW)]
    assert torch.equal(torch.cat(parts), row_scales(x, WINDOW)) and (row_scales(x, WINDOW) < 1).any()


def test_rows_of_zeros_stay_and_broken_rows_stay_broken(generator):
    x = torch.randn(2 * WINDOW, 16, generator=generator)
    x[:WINDOW] = 0
    x[WINDOW + 1, 3], x[WINDOW + 2, 5] = float("nan"), float("inf")
    kept, _ = finite_rows(x * row_scales(x, WINDOW), None)
    assert len(kept) == 2 * WINDOW - 2 and not kept[:WINDOW].any() and kept[WINDOW:].any(-1).all()

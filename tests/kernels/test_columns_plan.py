"""The walk over panels and the choice of tiles: pure functions, held without a device."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from sarqc_kernels import columns
from sarqc_kernels.aot import ARCHS
from sarqc_kernels.columns import config, panels
from sarqc_kernels.columns.config import PANEL
from sarqc_kernels.columns.grid import GridRule
from sarqc_kernels.device import Device


@pytest.mark.parametrize(("columns", "size"), [(512, 128), (200, 40), (129, 129), (600, 300), (64, 1), (17, 17)])
@pytest.mark.parametrize("given", [True, False])
def test_every_column_is_rounded_once_and_in_order(columns: int, size: int, given: bool) -> None:
    steps = list(panels.plan(columns, size, given))
    rounds = [(first, last) for action, first, last in steps if action in ("round", "fit")]
    assert rounds[0][0] == 0 and rounds[-1][1] == columns
    assert all(before[1] == after[0] for before, after in pairwise(rounds))
    assert all(last - first <= PANEL for action, first, last in steps if action in ("round", "fit", "free"))
    for action, first, last in steps:
        if action == "fit":
            assert first % size == 0 and last % size == 0
    if given:
        assert all(action == "round" for action, *_ in steps)


def test_a_wide_group_is_walked_free_then_fitted_then_rounded() -> None:
    assert list(panels.plan(400, 200, False)) == [
        ("start", 0, 200), ("fit wide", 0, 200), ("round", 0, 128), ("round", 128, 200),
        ("free", 200, 328), ("free", 328, 400), ("fit wide", 200, 400), ("round", 200, 328), ("round", 328, 400),
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 5, 7), (300, 64, 32), (1, 1 << 22, 4096), (100, 4096, 4096), (3, 1, 40_000)])
def test_batches_cover_everything_in_32_bits(shape: tuple[int, int, int]) -> None:
    experts, rows, columns = shape
    seen = 0
    for some, span in panels.batches(*shape):
        size = (some.stop - some.start, span.stop - span.start)
        seen += size[0] * size[1]
        assert size[0] <= panels.LAUNCH and size[1] * max(columns, PANEL) < 1 << 31
        assert size[0] * size[1] * columns <= max(panels.ELEMENTS, panels.LEAST_ROWS * columns)
    assert seen == experts * rows


def test_too_many_columns_are_refused() -> None:
    assert panels.too_large(53_248) is None  # the widest layer of Llama-3.1-405B
    assert panels.too_large(panels.WIDEST) is None and panels.WIDEST * panels.LEAST_ROWS < 1 << 31
    assert str(panels.WIDEST) in str(panels.too_large(panels.WIDEST + 1))


def test_choose_returns_what_is_listed() -> None:
    for arch in ARCHS:
        for experts, rows in ((1, 1), (1, 4096), (1, 14_336), (128, 1536), (8, 64)):
            own = config.choose(experts, rows, Device(arch, 132))
            assert own in config.tiles(Device(arch, 132)).values() and own.rows == 32 * own.warps
    assert config.choose(1, 4096, Device(90, 132)).rows == 32
    assert config.choose(128, 1536, Device(90, 132)).rows == 128


def test_more_groups_than_a_launch_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit has a row of programs for each group on the third axis; others go to another implementation."""
    monkeypatch.setattr(columns, "triton_unsupported", lambda _: None)
    fit = next(each for each in columns.implementations()["fit_grid"] if each.name == "triton")
    weight, rule = torch.empty(1, 1, 2 * panels.LAUNCH + 2), GridRule(4, True, False, torch.float32)
    assert fit.unsupported(weight[..., : panels.LAUNCH], None, 1, rule) is None
    assert fit.unsupported(weight[..., :-2], None, 2, rule) is None
    for size in (1, 2):
        assert f"{weight.shape[2] // size} groups" in str(fit.unsupported(weight, None, size, rule))


@pytest.mark.parametrize("sym", [True, False])
def test_table_holds_what_the_reference_multiplies_by(sym: bool) -> None:
    from sarqc_kernels.columns.grid import grid_of, span_factors

    rule = GridRule(3, sym, True, torch.float32)
    span, low = torch.tensor([0.7, 1.3]), torch.tensor([-0.3, -1.3])
    for pair, factor in zip(panels.factors_of(3, sym, torch.device("cpu")), span_factors(3), strict=True):
        scale, zero = grid_of(span, low, factor, rule)
        assert torch.equal(span * pair[0], scale)
        assert sym or torch.equal((low * pair[1] / scale).round().clamp(0, rule.top), zero)

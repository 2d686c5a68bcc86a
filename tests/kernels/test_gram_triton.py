"""What only the Triton Gram kernel has: its choice of tiles, the walk over the triangle, splits, flushes, refusals."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from sarqc_kernels import BackendError, gram_accumulate_
from sarqc_kernels.aot import ARCHS
from sarqc_kernels.device import Device
from sarqc_kernels.gram.config import FLUSH, Plan, Tile, choose, configurations, plan_of, predicted, tiles
from sarqc_kernels.testing import poisoned_empty
from tests.kernels.test_gram import fresh, whole_numbers

pytest.importorskip("triton")

from sarqc_kernels.gram import triton_impl

H200, A100 = Device(90, 132), Device(80, 108)


def run(plan: Plan, x: torch.Tensor, offsets: torch.Tensor | None = None, experts: int = 1):
    sums = fresh(experts, x.shape[1], x.device.type)
    with poisoned_empty():
        triton_impl.launch(plan, *sums, x, offsets)
    return sums


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_tiles_cover_the_triangle_once(ratio: int, device: str) -> None:
    """Rows have i // ratio + 1 tiles, in order, whatever rounding does to the square root."""
    for inputs in (1, 16, 17, 100, 513, 3000):
        tile = Tile(16, 16 * ratio, 16, 4, 2)
        rows = -(-inputs // 16)
        expected = [(row, column) for row in range(rows) for column in range(row // ratio + 1)]
        assert tile.units(inputs) == len(expected)
        if inputs <= 100:
            x = torch.zeros(16, inputs, device=device)
            x[0] = 1
            gram = run(Plan(tile, 1, tile.units(inputs)), x)[0][0].cpu() if inputs > 1 else torch.ones(1, 1)
            assert (gram.tril() == torch.ones(inputs, inputs).tril()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "plan",  # of fp32 half as many rows at a time, and half the stages: what a program of a card can share
    [
        Plan(Tile(32, 32, 16, 4, 2), splits=3, programs=2),
        Plan(Tile(32, 64, 32, 4, 2, descriptors=True), splits=1, programs=4),
        Plan(Tile(32, 64, 32, 4, 2, descriptors=True), splits=4, programs=7),
        Plan(Tile(32, 64, 32, 4, 2, descriptors=True, apart=True), splits=2, programs=5),
        Plan(Tile(128, 256, 64, 8, 4, descriptors=True), splits=2, programs=3),
        Plan(Tile(128, 128, 64, 8, 4), splits=1, programs=1),
    ],
    ids=str,
)
def test_any_plan_gives_the_same_sums(plan: Plan, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
    """Whole numbers, so exactly; two experts with rows, one with less rows than splits, one without any."""
    if device == "cuda" and plan.tile.descriptors and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this card has no bulk copies")
    if dtype == torch.float32:
        plan = replace(plan, tile=replace(plan.tile, depth=max(16, plan.tile.depth // 2), stages=2))
    x = whole_numbers(generator, 203, 80, most=4).to(dtype).to(device)
    x[:1] = x[200:] = float("nan")
    cuts = [1, 130, 130, 132, 200]
    gram, rows, abs_sum = run(plan, x, torch.tensor(cuts, device=device), experts=4)
    assert rows.tolist() == [129, 0, 2, 68]
    for expert, (begin, end) in enumerate(itertools.pairwise(cuts)):
        own = x[begin:end].double()
        assert torch.equal(gram[expert].tril().double(), (own.T @ own).tril())
        assert torch.equal(abs_sum[expert].double(), own.abs().sum(0))


@pytest.mark.parametrize("splits", [1, 2])
def test_more_rows_than_a_flush(splits: int, device: str, generator: torch.Generator) -> None:
    tokens = 2 * FLUSH + 77
    x = whole_numbers(generator, tokens, 32, most=2).half().to(device)
    plan = Plan(Tile(32, 32, 256, 4, 2), splits, programs=2)
    gram, rows, abs_sum = run(plan, x)
    assert torch.equal(gram[0].tril().double(), (x.double().T @ x.double()).tril())
    assert rows.tolist() == [tokens] and torch.equal(abs_sum[0].double(), x.double().abs().sum(0))


def test_choice_depends_on_nothing_else() -> None:
    for card, dtype, even in itertools.product((H200, A100), (torch.bfloat16, torch.float32), (True, False)):
        assert choose(1, 9000, 4096, dtype, card, even) == choose(1, 9000, 4096, dtype, card, even)
    assert choose(1, 8192, 4096, torch.bfloat16, H200, True) == Plan(Tile(128, 128, 64, 8, 4, True, True), 1, 132)
    assert choose(1, 1 << 18, 14336, torch.bfloat16, H200, True).tile.n == 256
    assert not choose(1, 1 << 18, 4096, torch.bfloat16, A100, True).tile.descriptors


@pytest.mark.parametrize("inputs", [768, 2048, 3072, 4096, 14336])
def test_splits_fill_the_card(inputs: int) -> None:
    """At least three quarters of the multiprocessors' time are used, whatever the number of tiles."""
    plan = choose(1, 1 << 18, inputs, torch.bfloat16, H200, True)
    items = plan.tile.units(inputs) * plan.splits
    waves = -(-items // H200.multiprocessors)
    assert items / (waves * H200.multiprocessors) > 0.75
    assert plan.programs <= H200.multiprocessors


@pytest.mark.parametrize("experts", [1, 8, 128])
@pytest.mark.parametrize("inputs", [768, 2048, 4096, 14336])
@pytest.mark.parametrize("tokens", [8192, 1 << 16, 1 << 18])
def test_no_other_plan_is_predicted_to_be_faster(experts: int, inputs: int, tokens: int) -> None:
    """And with wide tiles in splits 4096 inputs need a fifth less than with one wave of square tiles."""
    plan = choose(experts, tokens, inputs, torch.bfloat16, H200, True)
    time = predicted(plan.tile, plan.splits, experts, tokens, inputs, H200)
    for tile in tiles(90, torch.bfloat16, True).values():
        for splits in range(1, 17):
            other = plan_of(tile, experts, tokens, inputs, H200, splits)
            assert time <= predicted(tile, other.splits, experts, tokens, inputs, H200)
    if (experts, inputs, tokens) == (1, 4096, 1 << 18):
        assert plan.tile.n == 256 and plan.splits > 1
        assert time < 0.82 * predicted(tiles(90, torch.bfloat16, True)["128x128x64"], 1, 1, tokens, inputs, H200)


def test_few_rows_are_not_split() -> None:
    assert choose(1, 1000, 768, torch.bfloat16, H200, True).splits == 1
    assert choose(128, 1 << 16, 2048, torch.bfloat16, H200, True).splits == 1


def test_configurations_hold_every_choice() -> None:
    known = set(configurations())
    for arch in ARCHS:
        for dtype, even in itertools.product((torch.bfloat16, torch.float16, torch.float32), (True, False)):
            for inputs in (1, 64, 1000, 4096, 8191, 8192, 30000):
                plan = choose(1, 5000, inputs, dtype, Device(arch, 100), even)
                assert (arch, dtype, even, plan.tile) in known


def test_says_why_it_cannot(device: str) -> None:
    x = torch.zeros(8, 4, device=device)
    for broken, words in (
        ((*fresh(1, 8, device), x.T), "stride of 4 between the inputs"),
        ((*fresh(1, 0, device), x[:, :0]), "x has no inputs"),
        ((*fresh(1, 4, device), x[:1].expand(1 << 31, 4)), "beyond 32-bit indices"),
        ((fresh(1, 4, device)[0].mT, *fresh(1, 4, device)[1:], x), "not contiguous"),
    ):
        with pytest.raises(BackendError, match=words):
            gram_accumulate_(*broken, None, backend="triton")


@pytest.mark.gpu
def test_beyond_32_bits(device: str) -> None:
    """More than 2^31 elements of x, and of the Grams: exact, as every column holds one 1."""
    if device != "cuda":
        pytest.skip("no CUDA device")
    tokens, inputs = 1 << 20, 4096 + 128
    x = torch.zeros(tokens, inputs, dtype=torch.bfloat16, device=device)
    x[torch.arange(inputs, device=device) + tokens - inputs, torch.arange(inputs, device=device)] = 1
    gram, rows, abs_sum = fresh(1, inputs, device)
    gram_accumulate_(gram, rows, abs_sum, x, None, backend="triton")
    assert torch.equal(gram[0].tril(), torch.eye(inputs, device=device)) and (abs_sum == 1).all()
    del x, gram
    experts = 129
    sums = fresh(experts, inputs, device)
    offsets = torch.tensor([0] * experts + [inputs], device=device)
    x = torch.eye(inputs, dtype=torch.bfloat16, device=device)
    gram_accumulate_(*sums, x, offsets, backend="triton")
    assert torch.equal(sums[0][-1].tril(), torch.eye(inputs, device=device)) and not sums[0][-2].tril().any()

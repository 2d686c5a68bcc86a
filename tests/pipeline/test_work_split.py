"""Who does what: everything once, loads even, the same answer everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sarqc.errors import ArgumentError, ResourceError
from sarqc.method.layer import LayerReport, merge_reports
from sarqc.model.candidates import Target
from sarqc.model.sites import Site, SiteChunk
from sarqc.pipeline.comm import SINGLE_PROCESS, one_rank_at_a_time, synchronize_oom
from sarqc.pipeline.grams import portions
from sarqc.pipeline.streams import cut, windows_at_once
from sarqc.pipeline.work_split import (
    SOLVE_BYTES,
    cost,
    partition,
    partition_batches,
    positions,
    renumbered,
    solving_bytes,
    work_items,
)


def site(name, experts, rows, columns):
    members = [Target(f"{name}.{e}", (rows, columns), 0, name, f"{name}.weight", e) for e in range(experts)]
    return Site(name, tuple(members), experts, columns)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 40))
def test_every_window_goes_to_one_rank_in_whole_micro_batches_of_every_fold(size, folds, micro_batch, more):
    count = folds * size * micro_batch + more
    batches = cut(count, micro_batch, folds)
    dealt = partition_batches(batches, folds, size)
    assert sorted((batch for part in dealt for batch in part), key=lambda one: one[0].start) == batches
    assert all({fold for _, fold in part} == set(range(folds)) for part in dealt)
    for fold in range(folds):  # in the order of ranks, so that sums can be handed on
        assert [one for part in dealt for one in part if one[1] == fold] == [one for one in batches if one[1] == fold]
    assert torch.equal(torch.cat([positions(part) for part in dealt]).sort().values, torch.arange(count))
    for part in dealt:
        own = renumbered(part)
        assert torch.equal(positions(own), torch.arange(len(positions(part))))
        assert [fold for _, fold in own] == [fold for _, fold in part]


def test_too_few_windows_for_all_ranks_are_refused():
    with pytest.raises(ArgumentError, match="4 ranks cannot share 3 micro-batches"):
        partition_batches(cut(12, 2, 2), 2, 4)


def test_the_dearest_go_first_to_whoever_has_least():
    assert partition([1.0, 5.0, 2.0, 2.0], 2) == [1, 0, 1, 1]
    assert partition([3.0, 3.0, 3.0], 3) == [0, 1, 2]
    assert partition([], 2) == []


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from([8, 64, 96])), min_size=1, max_size=6), st.integers(1, 8))
@example([(1, 8)], 2)
def test_work_items_cover_every_row_of_every_expert_once(shapes, size):
    chunks = [SiteChunk(site(f"s{n}", experts, 16, k), 0, experts) for n, (experts, k) in enumerate(shapes)]
    items = work_items(chunks, size, torch.device("cpu"), gram=True)
    for number, chunk in enumerate(chunks):
        own = [item for item in items if item.number == number]
        covered = [
            (expert, row)
            for item in own
            for expert in range(item.chunk.first, item.chunk.stop)
            for row in range(16)[item.rows or slice(None)]
        ]
        assert covered == [(expert, row) for expert in range(chunk.stop) for row in range(16)]
    loads = [sum(cost(item.chunk) for item in items if item.owner == rank) for rank in range(size)]
    assert max(loads) <= sum(loads) / size + max(cost(item.chunk) for item in items)
    if size == 1:
        assert [item.chunk for item in items] == chunks


@pytest.mark.parametrize(
    ("room", "lengths"), [(1, [1] * 5), (2, [1, 2, 2]), (3, [2, 3]), (4, [2, 3]), (5, [5]), (99, [5])]
)
def test_no_more_experts_are_solved_at_once_than_there_is_memory_for(monkeypatch, room, lengths):
    chunk = SiteChunk(site("experts", 5, 16, 64), 0, 5)
    one = solving_bytes(SiteChunk(chunk.site, 0, 1), gram=True)
    assert one == 5 * 4 * 64 * 64 + 6 * 4 * 16 * 64 and solving_bytes(chunk, gram=False) == 5 * 16 * 16 * 64
    monkeypatch.setitem(SOLVE_BYTES, "cpu", room * one)
    items = work_items([chunk], 1, torch.device("cpu"), gram=True)
    assert [item.chunk.stop - item.chunk.first for item in items] == lengths


def test_many_like_experts_are_shared_evenly():
    chunk = SiteChunk(site("experts", 128, 64, 96), 0, 128)
    loads = [0] * 8
    for item in work_items([chunk], 8, torch.device("cpu"), gram=True):
        loads[item.owner] += item.chunk.stop - item.chunk.first
    assert loads == [16] * 8


def test_no_portion_holds_more_than_one_gram_where_none_fits_the_budget():
    sites = [site("a", 4, 16, 64), site("b", 2, 16, 64)]
    result = list(portions(sites, 1, 1))
    assert [[(chunk.site.name, chunk.first, chunk.stop) for chunk in portion] for portion in result] == [
        [(name, e, e + 1)] for name, experts in (("a", 4), ("b", 2)) for e in range(experts)
    ]


def test_reports_of_parts_join_to_that_of_the_whole():
    parts = [
        LayerReport(
            site="s",
            rows=(3, 4),
            error=0.1,
            rtn_error=0.2,
            reg_lambda=1.0,
            damping=0.5,
            fallback=None,
            seconds=2.0,
            exponent=0.5,
            signal=10.0,
        ),
        LayerReport(
            site="s",
            rows=(5,),
            error=0.4,
            rtn_error=0.8,
            reg_lambda=1.0,
            damping=0.7,
            fallback="why",
            seconds=1.0,
            exponent=0.2,
            signal=20.0,
        ),
    ]
    whole = merge_reports(parts)
    assert whole.rows == (3, 4, 5) and whole.fallback == "why" and whole.damping == 0.7 and whole.seconds == 3.0
    assert (whole.error, whole.rtn_error, whole.signal) == pytest.approx((0.3, 0.6, 30.0))
    assert whole.exponent == pytest.approx(0.4)
    assert merge_reports(parts[:1]) is parts[0]


def test_memory_that_runs_out_is_everybodys():
    def full():
        raise torch.OutOfMemoryError("tried to allocate 2 GB\nmore")

    with pytest.raises(torch.OutOfMemoryError, match=r"^tried to allocate 2 GB$"):
        synchronize_oom(SINGLE_PROCESS, full)
    assert synchronize_oom(SINGLE_PROCESS, lambda: 3) == 3


def test_memory_that_runs_out_while_ranks_wait_in_turn_ends_the_run(monkeypatch):
    def full():
        raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling")

    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_ALLOC_FAILED when calling") as raised:
        one_rank_at_a_time(SINGLE_PROCESS, full)
    assert not isinstance(raised.value, ResourceError)
    monkeypatch.setattr(type(SINGLE_PROCESS), "size", 2)
    with pytest.raises(ResourceError, match="while ranks wait for each other, in ordered sums"):
        one_rank_at_a_time(SINGLE_PROCESS, full)


def test_a_library_that_finds_no_memory_is_memory_that_runs_out_and_no_other_error_is():
    def failing(words):
        raise RuntimeError(words)

    with pytest.raises(torch.OutOfMemoryError, match="CUBLAS_STATUS_ALLOC_FAILED"):
        synchronize_oom(
            SINGLE_PROCESS,
            lambda: failing("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        )
    with pytest.raises(torch.OutOfMemoryError, match="can't allocate memory"):
        synchronize_oom(SINGLE_PROCESS, lambda: failing("DefaultCPUAllocator: can't allocate memory"))
    with pytest.raises(RuntimeError, match="an illegal access") as raised:
        synchronize_oom(SINGLE_PROCESS, lambda: failing("an illegal access"))
    assert not isinstance(raised.value, torch.OutOfMemoryError)


def test_a_cpu_takes_twice_the_tokens_at_once_in_16_bits():
    here = torch.device("cpu")
    assert [windows_at_once(here, 512, dtype) for dtype in (None, torch.float32, torch.bfloat16)] == [2, 2, 4]
    assert windows_at_once(here, 4096, torch.bfloat16) == 1
    assert windows_at_once(torch.device("cuda"), 512, torch.bfloat16) == windows_at_once(torch.device("cuda"), 512)

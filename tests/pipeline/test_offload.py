"""What suspended micro-batches hold is out of memory while they wait, and the results keep every bit."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from sarqc.errors import ResourceError
from sarqc.model import moe
from sarqc.pipeline.activation_store import FileStore, HostStore
from sarqc.pipeline.forward import Forward, Memory
from sarqc.pipeline.offload import Offload
from sarqc.pipeline.points import Hooks, Point
from tests.pipeline.classes import CONFIGS, blocks_of, build, windows
from tests.pipeline.test_forward import END, calls_of, plain, prefix_of, run, sites_of


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tensors here are tiny: park them all."""
    monkeypatch.setattr(Offload.__init__, "__defaults__", (1,))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_parked_in_a_file_the_logits_keep_every_bit(name, tmp_path):
    model = build(name)
    moe.use_sorted_experts(model)
    batches, prefix = windows(), prefix_of(model)
    expected = plain(model, batches)
    sites = [sites_of(model, index, prefix) for index in range(len(blocks_of(model)))]
    store = FileStore(tmp_path)
    with (
        Hooks(blocks_of(model)) as hooks,
        Forward(calls_of(model, batches), blocks_of(model), memory=Memory(0, store)) as forward,
    ):
        hooks.watch([point for block in sites for point in block], model)
        result = run(model, forward, sites, lambda arrivals, point: [list(forward.at(point)) for _ in range(2)])
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert store._end > 0 and sum(size for _, size in store._free) == store._end  # everything was taken back


@pytest.mark.parametrize("budget", [0, 40_000, 10**9])
def test_what_is_over_the_budget_is_parked_and_nothing_else(tmp_path, budget):
    model, batches = build("llama"), windows(4, 2, 32)
    point = Point("site", 0, "model.layers.0.mlp.down_proj")
    blocks, calls = blocks_of(model), calls_of(model, batches)
    with (
        Hooks(blocks) as hooks,
        Forward(calls, blocks, memory=Memory(budget, HostStore(10**9, FileStore(tmp_path)))) as forward,
    ):
        hooks.watch([point], model)
        list(forward.at(Point("enter", 0)))
        forward.begin_block([point])
        arrivals = []
        for arrival in forward.at(point):
            assert arrival.x.untyped_storage().nbytes() > 0  # in place while it is looked at
            arrivals.append(arrival)
        sizes = [arrival.x.untyped_storage().nbytes() for arrival in arrivals]
        alive = [sum(s.nbytes() for s in walk._offload.alive().values()) for walk in forward._batches]
    each = 2 * 32 * (64 + 96) * 4  # what enters down_proj and the residual beside it
    assert sum(alive) <= budget and [size > 0 for size in sizes] == [each * (n + 1) <= budget for n in range(4)]


def test_a_table_that_the_model_keeps_is_no_single_micro_batchs(tmp_path):
    """The first micro-batch makes it, the others use it while the first is parked."""

    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(8, 8)
            self.table = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.arange(8.0).repeat(4, 1) * 1
            return self.inner(x + self.table) * self.table

    block = Table()
    body = torch.nn.Sequential(block)
    batches = [torch.full((4, 8), float(n)) for n in range(3)]
    expected = [Table.forward(block, x).detach() for x in batches]
    block.table = None
    point = Point("site", 0, "0.inner")
    calls = [lambda x=x: body(x) for x in batches]
    with (
        Hooks([block]) as hooks,
        Forward(calls, [block], memory=Memory(0, HostStore(10**9, FileStore(tmp_path)))) as forward,
    ):
        hooks.watch([point], body)
        forward.begin_block([point])
        for _ in range(2):
            list(forward.at(point))
        actual = [arrival.output for arrival in forward.at(Point(END, 1))]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def storage(count, value=1):
    return torch.full((count,), value, dtype=torch.uint8).untyped_storage()


def test_a_file_uses_freed_ranges_again_and_is_gone_in_the_end(tmp_path):
    store = FileStore(tmp_path)
    a, b = store.put(storage(1000, 7)), store.put(storage(500, 8))
    store.drop(a)
    c, d = store.put(storage(400, 9)), store.put(storage(600, 5))
    assert store._end == 1500
    for ticket, value, count in ((b, 8, 500), (c, 9, 400), (d, 5, 600)):
        back = storage(count, 0)
        store.take(ticket, back)
        assert set(back.tolist()) == {value}
    assert store._free == [(0, 1500)] and not list(tmp_path.iterdir())


def test_a_disk_that_takes_no_more_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(ResourceError, match="activation-budget"):
        FileStore(tmp_path).put(storage(100))


def test_memory_is_used_before_the_file(tmp_path):
    file = FileStore(tmp_path)
    stores = HostStore(1000, file)
    tickets = [stores.put(storage(400, n)) for n in range(4)]
    assert file._end == 800
    stores.drop(tickets[0])
    stores.put(storage(400, 9))
    assert file._end == 800
    for n in (1, 2, 3):
        back = storage(400, 99)
        stores.take(tickets[n], back)
        assert set(back.tolist()) == {n}


def test_a_file_of_activations_is_closed_with_its_store(tmp_path):
    """A process that quantizes one model after the other has as many files open as before."""
    opened = lambda: len(list(Path("/proc/self/fd").iterdir()))  # noqa: E731
    before, store = opened(), FileStore(tmp_path)
    store.put(storage(100))
    assert opened() == before + 1
    del store
    gc.collect()
    assert opened() == before

"""The next block read in the background: the same tensors, at most one block of them, and no thread left over."""

from __future__ import annotations

import threading

import pytest
import torch

from sarqc.config import MethodConfig, QuantConfig
from sarqc.errors import CheckpointError
from sarqc.model.source import PrefetchingSource
from tests.support.blocks import run_blocks
from tests.support.models import StateDictSource

QUANT = QuantConfig(bits=4, group_size=32)
TENSORS = {name: torch.full((4,), float(number)) for number, name in enumerate("abc")}


class Slow(StateDictSource):
    """Waits for `go`; remembers which thread loaded what, and cannot load some."""

    def __init__(self, tensors, bad=()):
        super().__init__(tensors)
        self.go, self.loaded, self.bad = threading.Event(), [], bad
        self.go.set()

    def load(self, name):
        assert self.go.wait(10)
        self.loaded.append((name, threading.current_thread() is threading.main_thread()))
        if name in self.bad:
            raise CheckpointError(f"tensor {name!r} cannot be read")
        return super().load(name)


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_what_was_announced_is_read_in_another_thread_and_once():
    source = Slow(TENSORS)
    with PrefetchingSource(source) as prefetched:
        prefetched.read(["a", "c"])
        for name, tensor in TENSORS.items():
            assert torch.equal(prefetched.load(name), tensor)
        assert sorted(source.loaded) == [("a", False), ("b", True), ("c", False)]
        assert torch.equal(prefetched.load("a"), TENSORS["a"]) and source.loaded[-1] == ("a", True)
        assert (prefetched.names(), prefetched.shape("a"), prefetched.dtype("a"), prefetched.quantized("a")) == (
            ["a", "b", "c"], (4,), torch.float32, None,
        )  # fmt: skip
    assert readers() == []


def test_an_error_is_raised_where_the_tensor_is_used():
    with PrefetchingSource(Slow(TENSORS, bad="b")) as prefetched:
        prefetched.read("abc")
        assert torch.equal(prefetched.load("c"), TENSORS["c"])
        with pytest.raises(CheckpointError, match="'b' cannot be read"):
            prefetched.load("b")


def test_what_nobody_wants_any_more_is_not_read():
    source = Slow(TENSORS)
    source.go.clear()
    with PrefetchingSource(source) as prefetched:
        prefetched.read("ab")  # one of them has begun and waits
        prefetched.read("c")
        source.go.set()
        assert torch.equal(prefetched.load("c"), TENSORS["c"])
    assert [name for name, _ in source.loaded] in (["a", "c"], ["c"])
    assert readers() == []


def weights(results):
    return [
        tensor
        for result in results
        for weight in result.weights.values()
        for tensor in (weight.codes, weight.scales, weight.zeros)
    ]


def equal(these, those):
    return len(these) == len(those) and all(map(torch.equal, these, those))


@pytest.mark.parametrize("method", ["rtn", "sarqc-awq-gptq"])
def test_a_run_that_reads_ahead_is_the_same_run(tiny, method):
    case = tiny("qwen3_moe", num_hidden_layers=3)

    def run(**options):
        case.source.reads.clear()
        tokens = None if method == "rtn" else case.tokens
        return weights(run_blocks(case.lazy(), case.source, tokens, QUANT, MethodConfig(method), **options))

    plain, reads = run(), sorted(case.source.reads)
    assert equal(run(prefetch=True), plain) and sorted(case.source.reads) == reads
    assert readers() == []


def test_no_more_than_the_next_block_is_read(tiny):
    case = tiny("llama", num_hidden_layers=4)
    running = run_blocks(case.lazy(), case.source, None, QUANT, MethodConfig("rtn"), prefetch=True)
    next(running)
    running.close()
    assert readers() == []
    assert {name.split(".")[2] for name in case.source.reads} <= {"0", "1"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, CheckpointError])
def test_the_thread_ends_with_the_run_however_that_ends(tiny, error):
    case = tiny("llama")

    def raising(index, stage):
        if stage == "solve":
            raise error("now")

    with pytest.raises(error):
        next(run_blocks(case.lazy(), case.source, None, QUANT, MethodConfig("rtn"), prefetch=True, on_progress=raising))
    assert readers() == []


def test_a_block_that_cannot_be_read_fails_when_its_turn_comes(tiny):
    case = tiny("llama")
    source = Slow(case.tensors(), bad=["model.layers.1.mlp.up_proj.weight"])
    running = run_blocks(case.lazy(), source, None, QUANT, MethodConfig("rtn"), prefetch=True)
    assert next(running).index == 0
    with pytest.raises(CheckpointError, match="up_proj"):
        next(running)
    assert readers() == []

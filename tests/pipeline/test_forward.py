"""The model's own forward, suspended: no bit changes, and what is replaced at a stop counts from there."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from sarqc.errors import ModelError
from sarqc.model import moe
from sarqc.pipeline.forward import BlockCall, Forward, Memory
from sarqc.pipeline.points import Hooks, Point
from sarqc.pipeline.task import Task
from tests.pipeline.classes import CONFIGS, blocks_of, build, windows

END = "end"


def calls_of(model, batches):
    return [lambda tokens=tokens: model(input_ids=tokens, use_cache=False).logits for tokens in batches]


def plain(model, batches):
    with torch.no_grad():
        return [call() for call in calls_of(model, batches)]


def sites_of(model, block, prefix):
    """A site for every Linear and projection of a block, in the order in which a forward of the model reaches them."""
    seen = []
    with Hooks(blocks_of(model)) as hooks:
        points = [Point("site", block, f"{prefix}.{block}.{name}") for name in layers(blocks_of(model)[block])]
        hooks.watch(points, model)
        task = Task(calls_of(model, windows(1))[0], 0, lambda point: point in points)
        while not task.ended:
            arrival = task.resume()
            if not task.ended:
                seen.append(getattr(arrival, "point"))  # noqa: B009
    return seen


def layers(block):
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            yield name
        elif moe.is_experts(module):
            yield from (f"{name}.{projection}" for projection in moe.projections(module))


def prefix_of(model):
    return next(name for name, module in model.named_modules() if module is blocks_of(model))


def hooks_left(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.fixture(params=sorted(CONFIGS))
def model(request):
    result = build(request.param)
    moe.use_sorted_experts(result)
    return result


def run(model, forward, hooks, visit):
    """Every point of every block in turn, and then the logits. visit(arrivals, point) at each site."""
    prefix = prefix_of(model)
    for index in range(len(blocks_of(model))):
        list(forward.at(Point("enter", index)))
        sites = sites_of(model, index, prefix) if hooks is None else hooks[index]
        forward.begin_block(sites)
        for site in sites:
            visit(list(forward.at(site)), site)
        list(forward.leave(index))
    return [arrival.output for arrival in forward.at(Point(END, len(blocks_of(model))))]


@pytest.mark.parametrize("recompute", [False, True])
def test_suspended_at_every_layer_the_logits_keep_every_bit(model, recompute):
    batches, prefix = windows(), prefix_of(model)
    expected = plain(model, batches)
    sites = [sites_of(model, index, prefix) for index in range(len(blocks_of(model)))]
    assert all(sites)
    with (
        Hooks(blocks_of(model)) as hooks,
        Forward(calls_of(model, batches), blocks_of(model), memory=Memory(recompute=recompute)) as f,
    ):
        hooks.watch([point for block in sites for point in block], model)
        seen = []
        result = run(model, f, sites, lambda arrivals, point: seen.append([a.x.shape for a in arrivals]))
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert all(len(shapes) == len(batches) for shapes in seen)
    assert hooks_left(model) == 0


@pytest.mark.parametrize("recompute", [False, True])
def test_weights_replaced_at_stops_are_those_of_the_rest_of_the_forward(model, recompute):
    """Each layer is replaced when all micro-batches wait there: the result is that of a model with those weights."""
    batches, prefix = windows(), prefix_of(model)
    sites = [sites_of(model, index, prefix) for index in range(len(blocks_of(model)))]
    inputs = {}

    def halve(arrivals, point):
        inputs[point] = [arrival.x.clone() for arrival in arrivals]
        name = point.name if moe.is_experts(model.get_submodule(point.name.rpartition(".")[0])) else None
        parameter = model.get_parameter(name or f"{point.name}.weight")
        parameter.data = (parameter * 8).round() / 8

    before = plain(model, batches)
    with (
        Hooks(blocks_of(model)) as hooks,
        Forward(calls_of(model, batches), blocks_of(model), memory=Memory(recompute=recompute)) as f,
    ):
        hooks.watch([point for block in sites for point in block], model)
        result = run(model, f, sites, halve)
    expected = plain(model, batches)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert not torch.equal(result[0], before[0])
    with Hooks(blocks_of(model)) as hooks, Forward(calls_of(model, batches), blocks_of(model)) as f:
        hooks.watch([point for block in sites for point in block], model)

        def same(arrivals, point):  # what a layer was quantized on is what it meets when the model is served
            assert all(torch.equal(arrival.x, x) for arrival, x in zip(arrivals, inputs[point]))

        run(model, f, sites, same)


def test_blocks_can_be_empty_until_they_are_entered():
    """Weights are put in place while all micro-batches wait at the block's entry, and taken away behind it."""
    model, batches = build("llama"), windows()
    expected = plain(model, batches)
    stored = [{name: p.detach().clone() for name, p in block.named_parameters()} for block in blocks_of(model)]
    for block in blocks_of(model):
        empty(block)
    with Hooks(blocks_of(model)), Forward(calls_of(model, batches), blocks_of(model)) as forward:
        for index, block in enumerate(blocks_of(model)):
            list(forward.at(Point("enter", index)))
            for name, tensor in stored[index].items():
                path, _, leaf = name.rpartition(".")
                block.get_submodule(path)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            list(forward.leave(index))
            empty(block)
        actual = [arrival.output for arrival in forward.at(Point(END, 2))]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def empty(block):
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def test_a_forward_can_end_after_its_last_block(model):
    """Nothing behind the blocks is run, and nothing is left of the micro-batches."""
    behind = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda *_: behind.append(1))
    with Hooks(blocks_of(model)), Forward(calls_of(model, windows()), blocks_of(model)) as forward:
        for index in range(len(blocks_of(model))):
            list(forward.leave(index))
        left = [weakref.ref(arrival.x) for arrival in forward.at(Point("leave", len(blocks_of(model)) - 1))]
    gc.collect()
    handle.remove()
    assert not behind and all(ref() is None for ref in left)


class Wayward(nn.Module):
    """A block whose way depends on what it is given."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        first, second = (self.one, self.other) if float(x.sum()) > 0 else (self.other, self.one)
        return x + second(first(x))


def test_a_micro_batch_that_takes_another_way_is_refused_with_the_layers_name():
    body = nn.Sequential(Wayward())
    points = [Point("site", 0, "0.one"), Point("site", 0, "0.other")]
    calls = [lambda: body(torch.ones(1, 4)), lambda: body(-torch.ones(1, 4))]
    with Hooks(list(body)) as hooks, Forward(calls, list(body)) as forward:
        hooks.watch(points, body)
        forward.begin_block(points)
        with pytest.raises(ModelError, match=r"0\.other"):
            list(forward.at(points[0]))
    assert hooks_left(body) == 0


@pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError, KeyboardInterrupt, ModelError])
def test_errors_of_the_model_come_out_and_leave_nothing_behind(error):
    model, ended = build("llama"), []

    def call(tokens, number):
        try:
            return model(input_ids=tokens, use_cache=False).logits
        finally:
            ended.append(number)

    def fail(*_):
        raise error("on purpose")

    calls = [lambda t=t, n=n: call(t, n) for n, t in enumerate(windows())]
    expected = ModelError if error is ValueError else error
    layer, blocks = blocks_of(model)[1].mlp.down_proj, blocks_of(model)
    with pytest.raises(expected, match="on purpose"), Hooks(blocks), Forward(calls, blocks) as forward:
        list(forward.leave(0))
        handle = layer.register_forward_pre_hook(fail)
        list(forward.leave(1))
    handle.remove()
    assert sorted(ended) == [0, 1, 2] and hooks_left(model) == 0
    assert not torch.is_inference_mode_enabled() and torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize("words", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED", "CPUAllocator: can't allocate memory"])
def test_memory_that_runs_out_is_no_fault_of_the_configuration(words):
    model = build("llama")

    def full(*_):
        raise RuntimeError(words)

    blocks = blocks_of(model)
    blocks[0].register_forward_pre_hook(full)
    out_of_memory = pytest.raises(torch.OutOfMemoryError, match=words)
    with Hooks(blocks), Forward(calls_of(model, windows()), blocks) as forward, out_of_memory:
        list(forward.leave(0))


def test_a_correction_is_what_the_other_weight_would_have_given():
    """The last layer is let run as it is, and its outputs are changed where they have joined the stream."""
    for recompute in (False, True):
        model, batches = build("llama"), windows()
        down, end = Point("site", 0, "model.layers.0.mlp.down_proj"), Point("leave", 0)
        layer = blocks_of(model)[0].mlp.down_proj
        change = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(3)) * 0.1
        blocks, calls = blocks_of(model), calls_of(model, batches)
        with Hooks(blocks) as hooks, Forward(calls, blocks, memory=Memory(recompute=recompute)) as forward:
            list(forward.at(Point("enter", 0)))
            hooks.watch([down], model)
            forward.begin_block([down], kept=[down])
            before = [(a.x.clone(), x.clone()) for a, x in forward.with_kept(end, down)]
            forward.correct(end, down, change)
            after = [a.x.clone() for a in forward.leave(0)]
            again = [a.x.clone() for a in forward.leave(0)]  # once, however often it is asked for
            values = [arrival.output for arrival in forward.at(Point(END, 2))]
        for (leaving, x), corrected, once in zip(before, after, again):
            torch.testing.assert_close(corrected - leaving, x @ change.T, rtol=1e-4, atol=1e-5)
            assert torch.equal(corrected, once)
        layer.weight.data += change
        for logits, direct in zip(values, plain(model, batches)):
            torch.testing.assert_close(logits, direct, rtol=1e-4, atol=1e-4)


def test_a_block_can_be_run_again_from_its_entry(model):
    with Hooks(blocks_of(model)), Forward(calls_of(model, windows(1)), blocks_of(model)) as forward:
        for index, block in enumerate(blocks_of(model)):
            (entry,) = forward.at(Point("enter", index))
            call = BlockCall(block, entry)
            with torch.no_grad():
                first, second = call(), call()
            assert torch.equal(first, second)
            (leaving,) = forward.leave(index)
            assert torch.equal(leaving.x, first)

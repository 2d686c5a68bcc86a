"""What goes wrong in a run, put there on purpose. Each fault ends in a clear error or a recovered run, never in lost
data, and tells `outcomes` what it saw. The disk and the device are those of one process here; test_killed has kills,
test_distributed and test_heartbeat several ranks."""

from __future__ import annotations

import io
import os
import shutil
import signal

import pytest
import torch
from greenlet import getcurrent
from rich.console import Console
from safetensors.torch import load_file, save_file

import sarqc
from sarqc.cli.terminal import RunProgress
from sarqc.errors import CheckpointError, Interrupted, NumericError, ResourceError
from sarqc.method.hessian import Objective
from sarqc.pipeline import quantize_site
from sarqc.pipeline.resume import default_work
from sarqc.pipeline.streams import PROBE_TOKENS, Streams
from sarqc.pipeline.task import Task
from tests.support.fault_case import SMALL, recovered, weights, went_on

UP = "up_proj"


def in_block(case, index, change):
    """change(module, x) is called with what enters attention in a block, by micro-batches alone."""
    block = Streams.begin

    def begin(self, *args, **options):
        attention = self.lazy.blocks[index].self_attn
        if "changed" not in attention.__dict__:
            attention.__dict__["changed"] = attention.register_forward_pre_hook(hook, with_kwargs=True)
        return block(self, *args, **options)

    def hook(_, args, kwargs):
        if isinstance(getcurrent(), Task) and kwargs["hidden_states"].shape[1] > PROBE_TOKENS:
            kwargs = kwargs | {"hidden_states": change(kwargs["hidden_states"])}
        return args, kwargs

    case.patch.setattr(Streams, "begin", begin)


@pytest.mark.fault("device out of memory in the forward")
def test_device_full_in_the_forward(case):
    """Twice in a row, in the second block."""
    calls = []

    def full(hidden):
        calls.append(len(hidden))
        if len(calls) in (1, 2):
            raise torch.OutOfMemoryError("tried to allocate 2 GB")
        return hidden

    in_block(case, 1, full)
    notes = sarqc.quantize(case.source, case.out, **SMALL).report["notes"]
    assert ["micro-batch of 4 sequences halved" in notes[0], "micro-batch of 2 sequences halved" in notes[1]] == [
        True
    ] * 2
    assert len(notes) == 2 and calls[-1] == 1
    went_on(case)


@pytest.mark.fault("device out of memory in the first block")
def test_device_full_in_the_first_block(case):
    calls = []

    def full(hidden):
        calls.append(len(hidden))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("tried to allocate 2 GB")
        return hidden

    in_block(case, 0, full)
    notes = sarqc.quantize(case.source, case.out, micro_batch=2, **SMALL).report["notes"]
    assert notes and "micro-batch of 2 sequences halved" in notes[0] and calls[-1] == 1
    went_on(case)


@pytest.mark.fault("device out of memory while solving many experts")
def test_device_full_of_grams(case):
    solve, seen = quantize_site.solve_site, []

    def full(name, *args, **options):
        seen.append(name)
        if "[" not in name and "experts" in name:
            raise torch.OutOfMemoryError("tried to allocate 2 GB")
        return solve(name, *args, **options)

    case.patch.setattr(quantize_site, "solve_site", full)
    result = sarqc.quantize(case.source, case.out, **SMALL)
    assert "Grams at a time halved" in result.report["notes"][0]
    case.outcomes.recovered(weights(case.out), case.expected)  # fewer Grams at a time change nothing but the time


@pytest.mark.fault("device too small for one window and one Gram")
def test_device_too_small_for_anything(case):
    def full(*args, **options):
        raise torch.OutOfMemoryError("tried to allocate 2 GB")

    case.patch.setattr(quantize_site, "solve_site", full)
    with pytest.raises(ResourceError, match="one window and one Gram at a time: use a device with more memory"):
        sarqc.quantize(case.source, case.out, **SMALL)
    assert list(case.out.parent.iterdir()) == []
    recovered(case)


def poisoned(case, windows):
    """NaN in one token of `windows` of 128 windows, in front of the second block's attention."""

    def poison(hidden):
        hidden = hidden.clone()
        hidden[:windows, 5, 3] = float("nan")
        return hidden

    in_block(case, 1, poison)
    return sarqc.quantize(
        case.source,
        case.out,
        num_samples=128,
        seqlen=16,
        micro_batch=128,
        group_size=32,
        reg_lambda=0.3,
        error_correction=False,
    )


@pytest.mark.fault("NaN in under 1 % of the rows of activations")
def test_few_rows_not_finite(case):
    report = poisoned(case, 1).report
    values = [note for note in report["notes"] if "self_attn.q_proj" in note]
    assert values[0].startswith("1 of 2048 rows of the inputs of model.layers.1.self_attn.q_proj hold NaN or Inf")
    assert values[1].startswith("16 of 2048 rows of the inputs of model.layers.2.self_attn.q_proj")
    rows = [sum(site["rows"]) for site in report["sites"] if "q_proj" in site["site"]]
    assert rows == [2048, 2047, 2032]
    assert all(0 <= site["error"] < 1 for site in report["sites"])
    went_on(case)


@pytest.mark.fault("NaN in over 1 % of the rows of activations")
def test_many_rows_not_finite(case):
    with pytest.raises(NumericError, match=r"32 of 2048 rows of the inputs of model\.layers\.1\.self_attn\.o_proj"):
        poisoned(case, 2)
    assert not case.out.exists() and default_work(case.out).exists()
    shutil.rmtree(default_work(case.out))
    recovered(case)


@pytest.mark.fault("text of one token: singular Grams, experts without tokens")
def test_text_of_one_token(case):
    """Every Gram has rank one or so, and most experts see no token: nothing has a factor without damping."""
    tokens = torch.full((2, 32), 7)
    report = sarqc.quantize(case.source, case.out, dataset=tokens, group_size=32).report
    idle = [site for site in report["sites"] if 0 in site["rows"]]
    assert idle and all(0 <= site["error"] < 1 for site in report["sites"])
    went_on(case)


def spoiled(case, change):
    """A copy of the model with one tensor changed: what a broken download or training run leaves."""
    folder = shutil.copytree(case.source, case.out.with_name("spoiled"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors[f"model.layers.1.mlp.experts.2.{UP}.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericError) as caught:
        sarqc.quantize(folder, case.out, **SMALL)
    case.outcomes.clear_error(caught.value)
    assert not case.out.exists()
    return str(caught.value)


@pytest.mark.fault("NaN in the weights of one expert of one layer")
def test_nan_in_one_expert(case):
    def change(weight):
        weight[3, 5] = float("nan")

    assert f"model.layers.1.mlp.experts.2.{UP}.weight holds NaN or Inf" in spoiled(case, change)


@pytest.mark.fault("one expert of one layer whose outputs overflow")
def test_an_expert_that_overflows(case):
    message = spoiled(case, lambda weight: weight.fill_(3e38))
    assert "hold NaN or Inf on the calibration text" in message and "model.layers.1.mlp.experts" in message


def indefinite(case, shift):
    """The matrices of one site are no longer positive definite: `shift` times their mean diagonal is taken off."""

    hessian = Objective.hessian

    def spoil(self, method):
        result = hessian(self, method)
        if len(result) == 4 and result.shape[-1] == 64:  # experts, in every layer
            diagonal = result.diagonal(dim1=-2, dim2=-1)
            diagonal -= shift * diagonal.mean(-1, keepdim=True)
        return result

    case.patch.setattr(Objective, "hessian", spoil)
    report = sarqc.quantize(case.source, case.out, **SMALL).report
    went_on(case)
    return [site for site in report["sites"] if "experts" in site["site"]]


@pytest.mark.fault("a Gram that is not positive definite")
def test_an_indefinite_gram_climbs_the_ladder(case):
    assert all(0 < site["damping"] <= 1 and site["fallback"] is None for site in indefinite(case, 0.26))


@pytest.mark.fault("a Gram that no damping makes positive definite")
def test_a_hopeless_gram_is_rounded_plainly_and_named(case):
    assert all("RTN" in site["fallback"] for site in indefinite(case, 0.9))


class Pressed(RunProgress):
    """A person at the keyboard: Ctrl-C in the middle of block 0, once or twice."""

    def __init__(self, times):
        self.written = io.StringIO()
        super().__init__(Console(file=self.written))
        self.times = times

    def stage(self, block, name):
        if (block, name) == (1, "forward"):  # a block announces it more than once
            times, self.times = self.times, 0
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.fault("Ctrl-C once")
def test_interrupted_once(case):
    with pytest.raises(Interrupted, match="after block 2 of 3"), Pressed(1) as progress:
        sarqc.quantize(case.source, case.out, progress=progress, **SMALL)
    assert "finishing this step" in progress.written.getvalue()
    assert len(list((default_work(case.out) / "blocks").glob("*.json"))) == 2
    recovered(case)


@pytest.mark.fault("Ctrl-C twice")
def test_interrupted_twice(case):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Pressed(2) as progress:
        sarqc.quantize(case.source, case.out, progress=progress, **SMALL)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(list((default_work(case.out) / "blocks").glob("*.json"))) == 1
    recovered(case)


@pytest.mark.fault("a model truncated between two parts of a run")
def test_model_changes_under_the_run(case):
    other = case.out.with_name("model")
    shutil.copytree(case.source, other)
    with pytest.raises(Interrupted), Pressed(1) as progress:
        sarqc.quantize(other, case.out, progress=progress, **SMALL)
    with (other / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="truncated"):
        sarqc.quantize(other, case.out, **SMALL)
    shutil.rmtree(other)
    recovered(case)


def test_a_dense_layer_that_runs_out_does_not_halve_the_grams_of_experts(case):
    """It has one Gram, however many the experts of the block before it had."""
    solve, failed = quantize_site.solve_site, []

    def full(name, *args, **options):
        if name == "model.layers.1.self_attn.q_proj" and not failed:
            failed.append(name)
            raise torch.OutOfMemoryError("tried to allocate 2 GB")
        return solve(name, *args, **options)

    case.patch.setattr(quantize_site, "solve_site", full)
    (note,) = sarqc.quantize(case.source, case.out, **SMALL).report["notes"]
    assert failed and "micro-batch of 4 sequences halved" in note


def test_rounding_that_runs_out_is_told_what_helps_it(case):
    """Without calibration there are neither windows nor Grams that could be fewer."""

    def full(*args, **options):
        raise torch.OutOfMemoryError("tried to allocate 2 GB")

    case.patch.setattr(quantize_site, "solve_site", full)
    with pytest.raises(ResourceError, match=r"\(tried to allocate 2 GB\): use a device with more memory"):
        sarqc.quantize(case.source, case.out, method="rtn", group_size=32)

"""Several ranks, by gloo on this machine: the codes of one process, whatever the number, and no rank left waiting."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import sarqc
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.errors import Interrupted, NumericError
from sarqc.pipeline import block, distributed, grams, quantize_site
from sarqc.pipeline.channel_scales import BlockScales
from sarqc.pipeline.progress import NoProgress
from sarqc.pipeline.resume import default_work
from tests.support import tiny
from tests.support.ranks import in_ranks

SMALL = {"num_samples": 8, "seqlen": 32, "group_size": 32, "micro_batch": 1, "method": "sarqc-awq-gptq"}
BOUND = 0.01
"""Share of codes that may differ from those of one process where sums are made in another order."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny.save(kind, folder / kind, num_hidden_layers=2) for kind in ("llama", "qwen3_moe")}


@pytest.fixture(scope="module")
def straight(models, tmp_path_factory):
    """One process."""
    folder = tmp_path_factory.mktemp("straight")
    return {kind: sarqc.quantize(path, folder / kind, **SMALL) for kind, path in models.items()}


def in_all(size, source, out, log, **changes):
    """Quantize with `size` ranks; all must end well."""
    ended = in_ranks(size, lambda rank: sarqc.quantize(source, out, **SMALL | changes), log)
    assert ended == [(0, "")] * size, ended


def weights(out):
    return (out / "model.safetensors").read_bytes()


def stored(out):
    with open_checkpoint(out) as checkpoint:
        return [checkpoint.quantized(linear) for linear in checkpoint.linears()]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_ordered_sums_give_the_bytes_of_one_process(models, straight, tmp_path, kind, size):
    in_all(size, models[kind], tmp_path / "out", tmp_path / "log", ordered=True)
    assert weights(tmp_path / "out") == weights(straight[kind].out)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for site, one in zip(report["sites"], straight[kind].report["sites"], strict=True):
        assert site["site"] == one["site"] and site["rows"] == list(one["rows"])
        sampled = len(one["rows"]) == 1  # of a dense layer, of which each rank judges some of its own rows
        assert site["error"] == pytest.approx(one["error"], rel=0.1 if sampled else 1e-6)


def test_ranks_agree_on_the_layer_that_makes_up_for_errors(models, tmp_path, monkeypatch):
    """Also where one of them finds none on its own window, as where activations there are not finite."""
    options = SMALL | {"method": "sarqc-gptq", "num_samples": 4}
    one = sarqc.quantize(models["llama"], tmp_path / "one", **options)
    assert any(site["correction_share"] > 0 for site in one.report["sites"])

    def action(rank):
        if rank == 1:
            monkeypatch.setattr(block, "residual_writes", lambda *_, **__: {})
        sarqc.quantize(models["llama"], tmp_path / "two", **options, ordered=True)

    assert in_ranks(2, action, tmp_path / "log", seconds=30) == [(0, "")] * 2
    assert weights(tmp_path / "two") == weights(one.out)


@pytest.mark.parametrize(("kind", "size"), [("llama", 4), ("qwen3_moe", 2)])
def test_other_sums_change_few_codes(models, straight, tmp_path, kind, size):
    in_all(size, models[kind], tmp_path / "out", tmp_path / "log")
    pairs = list(zip(stored(tmp_path / "out"), stored(straight[kind].out), strict=True))
    differing = sum(int((one.codes != other.codes).sum()) for one, other in pairs)
    assert differing <= BOUND * sum(one.codes.numel() for one, _ in pairs)


def test_plain_rounding_is_shared_out_too(models, tmp_path):
    plain = {"method": "rtn", "group_size": 32}
    one = sarqc.quantize(models["qwen3_moe"], tmp_path / "one", **plain)
    ended = in_ranks(2, lambda _: sarqc.quantize(models["qwen3_moe"], tmp_path / "two", **plain), tmp_path / "log")
    assert ended == [(0, "")] * 2 and weights(tmp_path / "two") == weights(one.out)


class Stopping(NoProgress):
    def __init__(self, stops):
        self.stops = stops

    def stop_requested(self):
        return self.stops


@pytest.mark.parametrize("lost", [False, True], ids=["hidden states", "hidden states lost"])
def test_a_run_goes_on_with_another_number_of_ranks(models, straight, tmp_path, lost):
    """Begun by two, of which only the last was asked to stop; finished by four."""
    out, source = tmp_path / "out", models["qwen3_moe"]

    def stopping(rank):
        with pytest.raises(Interrupted, match="after block 1 of 2"):
            sarqc.quantize(source, out, ordered=True, progress=Stopping(rank == 1), **SMALL)

    assert in_ranks(2, stopping, tmp_path / "log") == [(0, "")] * 2
    assert default_work(out).exists() and not out.exists()
    if lost:
        (default_work(out) / "hidden.safetensors").unlink()
    in_all(4, source, out, tmp_path / "log2", ordered=True)
    assert weights(out) == weights(straight["qwen3_moe"].out)


@pytest.mark.fault("a rank that fails or is killed")
@pytest.mark.parametrize("ordered", [False, True], ids=["summed", "ordered"])
@pytest.mark.parametrize("how", ["raises", "killed"])
def test_a_rank_that_ends_early_ends_all(models, straight, tmp_path, outcomes, how, ordered):
    out, source = tmp_path / "out", models["qwen3_moe"]
    solve_site = quantize_site.solve_site

    def failing(rank):
        def bad(name, *args, **options):
            if rank == 1 and "layers.1." in name:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise NumericError(f"{name}: no good")
            return solve_site(name, *args, **options)

        setattr(quantize_site, "solve_site", bad)  # noqa: B010
        sarqc.quantize(source, out, ordered=ordered, **SMALL)

    began = time.monotonic()
    (first, message), (second, word) = in_ranks(2, failing, tmp_path / "log")
    assert time.monotonic() - began < 60
    assert first == 2 and message.startswith("rank 0 of 2, block 2: another rank ended or cannot be reached")
    if how == "raises":
        assert second == 2 and word.startswith("rank 1 of 2, block 2: model.layers.1.") and word.endswith("no good")
    else:
        assert second == -signal.SIGKILL
    assert not out.exists() and default_work(out).exists()
    if ordered:
        sarqc.quantize(source, out, **SMALL)
        outcomes.recovered(weights(out), weights(straight["qwen3_moe"].out))
    else:
        outcomes.clear_error(message)


@pytest.mark.fault("device out of memory on one of two ranks")
def test_memory_that_runs_out_on_one_rank_makes_all_take_less(models, straight, tmp_path, outcomes):
    out, solve_site = tmp_path / "out", quantize_site.solve_site

    def failing(rank):
        left = [1]

        def full(name, *args, **options):
            if rank == 1 and left and "layers.1.mlp.experts" in name:
                left.clear()
                raise torch.OutOfMemoryError("tried to allocate 2 GB")
            return solve_site(name, *args, **options)

        setattr(quantize_site, "solve_site", full)  # noqa: B010
        result = sarqc.quantize(models["qwen3_moe"], out, ordered=True, **SMALL | {"method": "gptq"})
        assert any("Grams at a time halved" in note for note in result.report["notes"])

    assert in_ranks(2, failing, tmp_path / "log") == [(0, "")] * 2
    one = sarqc.quantize(models["qwen3_moe"], tmp_path / "one", **SMALL | {"method": "gptq"})
    outcomes.recovered(weights(out), weights(one.out))


@pytest.mark.parametrize(
    ("room", "name"),
    [
        (block, "find_mappings"),
        (block, "shrink_experts"),
        (grams, "_finite"),
        (BlockScales, "_take"),
        (block, "residual_writes"),
        (block, "write_back"),
    ],
    ids=["mappings", "Grams", "finite", "scales", "residual writes", "weights"],
)
def test_memory_that_runs_out_between_two_meetings_keeps_ranks_in_step(models, tmp_path, room, name):
    """On one rank alone, where no other waits: none of them may take its next word for another one's."""
    call = getattr(room, name)

    def failing(rank):
        left = [1]

        def full(*args, **options):
            if rank == 1 and left:
                left.clear()
                raise torch.OutOfMemoryError("tried to allocate 2 GB")
            return call(*args, **options)

        setattr(room, name, full)
        result = sarqc.quantize(models["qwen3_moe"], tmp_path / "out", **SMALL | {"micro_batch": 2})
        assert not left or rank == 0
        assert any("halved" in note for note in result.report["notes"])

    assert in_ranks(2, failing, tmp_path / "log") == [(0, "")] * 2


def test_rank_0_alone_writes(models, tmp_path):
    out = tmp_path / "out"

    def watched(rank):
        def refuse(event, args):
            if rank > 0 and str(tmp_path) in str(args[0] if args else ""):
                writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
                assert not writes and event not in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"), (event, args)

        sys.addaudithook(refuse)
        sarqc.quantize(models["llama"], out, **SMALL)

    assert in_ranks(2, watched, tmp_path / "log") == [(0, "")] * 2
    assert out.exists() and not default_work(out).exists()


@pytest.mark.fault("ranks that see different texts")
def test_ranks_that_see_different_texts_are_told(models, tmp_path, outcomes):
    def different(rank):
        sarqc.quantize(models["llama"], tmp_path / "out", **SMALL | {"seed": rank})

    ended = in_ranks(2, different, tmp_path / "log")
    assert all(code == 2 and "calibration" in word and "give all the same" in word for code, word in ended), ended
    outcomes.clear_error(ended[0][1])


def test_too_many_ranks_for_the_text_are_refused(models, tmp_path):
    ended = in_ranks(
        4, lambda _: sarqc.quantize(models["llama"], tmp_path / "out", **SMALL | {"num_samples": 4}), tmp_path / "log"
    )
    assert all(code == 2 and "4 ranks cannot share 2 micro-batches" in word for code, word in ended), ended
    assert not list(tmp_path.glob("*out*"))


def test_torchrun_starts_the_command(models, tmp_path):
    """The whole way: torchrun, the command line, one table on stdout, a preflight that counts the ranks."""
    out = tmp_path / "out"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sarqc"]
    done = subprocess.run(
        [*torchrun, "quantize", str(models["llama"]), "-o", str(out), "--json", *options],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(out)
    assert "on 2 ranks" in done.stderr


def test_without_torchrun_there_is_one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.world() == 1 and distributed.is_leader()
    with distributed.process_group("cpu", ordered=True) as (comm, device):
        assert (comm.rank, comm.size, comm.ordered, device) == (0, 1, False, "cpu")

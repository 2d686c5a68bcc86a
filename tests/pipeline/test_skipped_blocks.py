"""Blocks that text does not pass through, and layers that are called for a part of it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import sarqc
from sarqc.errors import Interrupted
from sarqc.pipeline.blockwise_forward import last_block_output, logits
from tests.support import families
from tests.support.stopping import Stopping

SMALL = {"num_samples": 2, "seqlen": 32, "group_size": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Four blocks; the second attends to images alone."""
    return families.save("mllama+vl", tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def straight(source, tmp_path_factory):
    return sarqc.quantize(source, tmp_path_factory.mktemp("straight") / "out", **SMALL).out


def test_a_block_that_text_skips_stays_as_it_is(source, straight):
    lazy = families.lazy(source)
    assert lazy.skipped == {1}
    before, after = (load_file(folder / "model.safetensors") for folder in (source, straight))
    inside = [name for name in before if "language_model.model.layers.1." in name]
    assert inside and all(torch.equal(before[name], after[name]) for name in inside)
    assert any(name.endswith("layers.2.mlp.up_proj.weight_packed") for name in after)
    assert families.apart(families.logits(straight, "+vl"), families.ours(straight)) < 0.05


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_run_that_stops_beside_it_goes_on(source, straight, tmp_path, blocks):
    with pytest.raises(Interrupted):
        sarqc.quantize(source, tmp_path / "out", progress=Stopping(blocks), **SMALL)
    again = Stopping()
    sarqc.quantize(source, tmp_path / "out", progress=again, **SMALL)
    assert again.solved[-1] == 3 and len(again.solved) < 4
    wanted, actual = ((folder / "model.safetensors").read_bytes() for folder in (straight, tmp_path / "out"))
    assert wanted == actual


def test_the_model_is_evaluated_past_it(source):
    lazy, checkpoint = families.split(source)
    with checkpoint, torch.no_grad():
        lazy.load_outer(checkpoint, head=True)
        output = last_block_output(lazy, checkpoint, families.TOKENS[:1])
        actual = logits(lazy, output.form, output.hidden)
        wanted = sarqc.load(source, dtype="bfloat16")[0](input_ids=families.TOKENS[:1]).logits[0]
    assert torch.equal(actual, wanted)


def test_a_layer_that_is_called_for_a_part_of_the_stream_corrects_nothing(tmp_path):
    """ProphetNet has one output projection for several streams, which it calls one by one."""
    report = sarqc.quantize(families.save("prophetnet", tmp_path / "in"), tmp_path / "out", **SMALL).report
    assert report["targets"]["quantized"] == 14

"""Mixed bits: one command, widths within the average, alike where servers fuse, and kept by whatever follows."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sarqc
from sarqc.checkpoint.formats.common import check_weight
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.cli import app
from sarqc.config import QuantConfig
from sarqc.conventions import FUSED
from sarqc.entrypoints import quantize as job
from sarqc.entrypoints.convert import convert
from sarqc.entrypoints.load import load
from sarqc.entrypoints.verify import verify
from sarqc.errors import ArgumentError, CheckpointError, Interrupted
from sarqc.model.packed_linear import PackedWeight
from sarqc.pipeline import bit_allocation
from sarqc.pipeline.bit_allocation import BitAllocation, UnitBits, choose
from sarqc.pipeline.progress import NoProgress
from sarqc.pipeline.resume import default_work
from sarqc.pipeline.sensitivity import SiteSensitivity
from sarqc.report import report as reports
from tests.support import kept, tiny
from tests.support.ranks import in_ranks

SMALL = {"num_samples": 4, "seqlen": 32, "group_size": 32, "avg_bits": 4.0}
AVERAGE = {"llama": 4.0, "qwen3_moe": 4.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny.save(kind, folder / kind) for kind in AVERAGE}


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    """A finished run of each kind, with its work folder."""
    folder = tmp_path_factory.mktemp("runs")
    return {kind: kept.quantize(path, folder / kind, **SMALL) for kind, path in models.items()}


def widths_on_disk(folder):
    with open_checkpoint(folder) as checkpoint:
        return {linear: checkpoint.describe(linear).bits for linear in checkpoint.linears()}


@pytest.mark.parametrize("kind", AVERAGE)
def test_widths_differ_within_the_average_and_never_where_servers_fuse(models, runs, kind):
    run = runs[kind]
    result = widths_on_disk(run.out)
    assert len(set(result.values())) > 1
    average = run.report["widths"]["average"]
    assert 3.5 < average <= 4.0
    shapes = 128 * len(result) / run.report["size"]["quantized_weights"]  # each Linear's shape is stored beside it
    assert average + shapes == pytest.approx(run.report["size"]["bits_per_weight"], abs=6e-4)
    for linear, bits in result.items():
        parent, _, leaf = linear.rpartition(".")
        for family in (names for names in FUSED if leaf in names):
            assert {result.get(f"{parent}.{other}", bits) for other in family} == {bits}, linear
        if ".experts." in linear:
            stack = linear.partition(".experts.")[0]
            assert {b for name, b in result.items() if name.startswith(f"{stack}.experts.")} == {bits}
    assert verify(run.out, against=models[kind]).sound


def test_verify_says_which_server_runs_layers_of_each_width(runs):
    bits = list(widths_on_disk(runs["llama"].out).values())
    by_name = {one.server: one for one in verify(runs["llama"].out).serve if one.ranks == 1}
    marlin = sum(width in (4, 8) for width in bits)
    assert by_name["vLLM 0.33, sm_80"].kernels == {"Marlin": marlin, "Humming": len(bits) - marlin}
    refused = " ".join(by_name["SGLang 0.5.23"].failures)
    for width in (2, 3, 4, 5, 6, 8):
        assert (f"{width} bits symmetric" in refused) is (width in set(bits) - {4, 8})


def test_what_loses_more_gets_more():
    def site(name, loss, module):
        losses = {2: 16 * loss, 3: 4 * loss, 4: loss}
        return SiteSensitivity(name, (name,), ((64, 64),), (module,), loss, losses)

    sites = [site("b.0.q_proj", 1.0, "q"), site("b.0.o_proj", 0.1, "o"), site("b.0.gate_proj", 0.01, "gate")]
    sites += [site("b.0.experts.0.a", 0.01, "e"), site("b.0.experts.0.b", 50.0, "e"), site("b.0.up_proj", 9.0, "up")]
    result = choose(sites, QuantConfig(group_size=64, avg_bits=3.7, bit_options=(2, 3, 4)))
    bits = result.by_linear()
    assert bits["b.0.experts.0.a"] == bits["b.0.experts.0.b"] == 4  # one module
    assert bits["b.0.gate_proj"] == bits["b.0.up_proj"] > bits["b.0.o_proj"]  # one matrix, by their names
    assert result.average <= 3.7 and BitAllocation.from_json(json.loads(json.dumps(result.to_json()))) == result


def logits_and_expanded(out, **how):
    """What transformers' from_pretrained says, and our own model with all weights expanded."""
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True, **how)
    assert not any(info.values()), info
    with torch.inference_mode():
        return model(tokens).logits, load(out, device="cpu", dtype="float32", packed=False)[0](tokens).logits


def away(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", AVERAGE)
def test_packed_by_transformers_and_by_us(runs, registered, kind):
    actual, expected = logits_and_expanded(runs[kind].out)
    assert away(actual, expected) < 0.01
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    model, _ = load(runs[kind].out, device="cpu", dtype="float32")
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, actual)
    assert len({module.bits for module in model.modules() if isinstance(module, PackedWeight)}) > 1


def test_compressed_tensors_expands_dense_layers_of_every_width(runs):
    assert away(*logits_and_expanded(runs["llama"].out)) < 0.01


def test_transformers_alone_never_takes_experts_for_another_width(tmp_path, monkeypatch):
    """It has one scheme for the experts of all layers, and takes it from the first group that names some."""
    source = tiny.save("qwen3_moe", tmp_path / "model", hidden_size=512)

    def by_layer(sites, quant, seconds=0.0):
        units = [
            UnitBits(site.site, 3 + int(".1." in site.site.partition(".experts.")[0]), 1, {}, site.linears)
            for site in sites
        ]
        return BitAllocation(3.5, 0.0, tuple(units))

    monkeypatch.setattr(bit_allocation, "choose", by_layer)
    out = sarqc.quantize(source, tmp_path / "out", **SMALL).out
    bits = widths_on_disk(out)
    assert {b for name, b in bits.items() if ".experts." in name} == {3, 4}
    with pytest.raises((RuntimeError, ValueError)):
        logits_and_expanded(out)


def test_the_report_shows_who_got_what(runs):
    run = runs["llama"]
    report = reports.load(run.out)
    assert report["quant"]["avg_bits"] == 4.0 and "linears" not in report["widths"]["units"][0]
    by_site = {site["site"]: site["bits"] for site in report["sites"]}
    assert {unit["name"]: unit["bits"] for unit in report["widths"]["units"]} == by_site
    assert report["seconds"]["sensitivity"] > 0
    assert "Bits by layer" in (run.out / "report.html").read_text()
    card = (run.out / "README.md").read_text()
    assert (
        "4 bits on average" in card
        and "Layers have different widths" in card
        and "--avg-bits 4 --bit-options 2,3,4,5,6,8" in card
    )


class Stopping(NoProgress):
    def __init__(self):
        self.stages = []

    def stage(self, block, name):
        self.stages.append((block, name))

    def stop_requested(self):
        return True


def test_a_stopped_run_goes_on_with_its_widths(models, runs, tmp_path):
    progress = Stopping()
    with pytest.raises(Interrupted):
        sarqc.quantize(models["llama"], tmp_path / "out", progress=progress, **SMALL)
    assert [stage for stage in progress.stages if stage[1] == "sensitivity"] == [(0, "sensitivity"), (1, "sensitivity")]
    with pytest.raises(ArgumentError, match=r"begun with avg_bits = 4\.0, now it is 3\.5"):
        sarqc.quantize(models["llama"], tmp_path / "out", **SMALL | {"avg_bits": 3.5})
    work = default_work(tmp_path / "out")
    kept = tmp_path / "kept"
    shutil.copytree(work, kept)
    again = Stopping()
    sarqc.quantize(models["llama"], tmp_path / "out", progress=again, **SMALL)
    assert "sensitivity" not in {name for _, name in again.stages}
    theirs, ours = (folder / "model.safetensors" for folder in (runs["llama"].out, tmp_path / "out"))
    assert theirs.read_bytes() == ours.read_bytes()
    (kept / "bit_allocation.json").unlink()
    with pytest.raises(CheckpointError, match=r"bit_allocation.json is missing.*--no-resume"):
        sarqc.quantize(models["llama"], tmp_path / "other", work_dir=kept, **SMALL)
    (kept / "bit_allocation.json").write_text('{"units": []}')
    with pytest.raises(CheckpointError, match=r"bit_allocation.json is damaged.*--no-resume"):
        sarqc.quantize(models["llama"], tmp_path / "other", work_dir=kept, **SMALL)


def test_a_choice_outlives_a_run_that_ends_before_its_first_block(models, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("gone")

    with monkeypatch.context() as patched:
        patched.setattr(job.driver, "run", fail)
        with pytest.raises(RuntimeError, match="gone"):
            sarqc.quantize(models["llama"], tmp_path / "out", **SMALL)
    progress = Stopping()
    with pytest.raises(Interrupted):
        sarqc.quantize(models["llama"], tmp_path / "out", progress=progress, **SMALL)
    assert "sensitivity" not in {name for _, name in progress.stages}


def test_convert_keeps_every_width(runs, tmp_path):
    run = runs["qwen3_moe"]
    for name, weight in kept.opened(run.out).stored(0)[0].items():
        check_weight(name, weight, QuantConfig(weight.bits, 32))
    converted = convert(run.out, tmp_path / "converted", format="compressed-tensors")
    assert widths_on_disk(converted.out) == widths_on_disk(run.out)
    assert (converted.out / "model.safetensors").read_bytes() == (run.out / "model.safetensors").read_bytes()
    for format in ("gptq", "awq"):
        with pytest.raises(CheckpointError, match="its config has one width for all layers"):
            convert(run.out, tmp_path / format, format=format)


def test_several_ranks_choose_alike(models, runs, tmp_path):
    settings = SMALL | {"micro_batch": 1}
    straight = sarqc.quantize(models["qwen3_moe"], tmp_path / "straight", **settings)
    log = tmp_path / "log"
    ended = in_ranks(
        2, lambda rank: sarqc.quantize(models["qwen3_moe"], tmp_path / "out", ordered=True, **settings), log
    )
    assert ended == [(0, "")] * 2, ended
    assert widths_on_disk(tmp_path / "out") == widths_on_disk(straight.out)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"method": "rtn"},
            ArgumentError,
            "avg_bits = 4.* method rtn",
        ),
        (
            {"avg_bits": 2.1},
            ArgumentError,
            r"avg_bits = 2.1 is out of range: with scales, 2 to 8 bits take 2.5\d+ to 8.5",
        ),
        ({"avg_bits": 8.9}, ArgumentError, "avg_bits = 8.9 is out of range"),
        ({"avg_bits": 1.5}, ArgumentError, "avg_bits = 1.5"),
        ({"bit_options": (3, 9)}, ArgumentError, r"bit_options = \(3, 9\)"),
        ({"avg_bits": None, "bit_options": (3, 4)}, ArgumentError, "give avg_bits"),
        ({"format": "gptq"}, CheckpointError, "cannot be held by gptq: its config has one width for all layers"),
        ({"format": "awq"}, CheckpointError, "cannot be held by awq"),
        ({"router_weight_power": 3}, ArgumentError, "router_weight_power = 3"),
        ({"expert_shrinkage": -1.0}, ArgumentError, "expert_shrinkage = -1.0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(models, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        sarqc.quantize(models["llama"], tmp_path / "out", **SMALL | settings)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_is_known(models, tmp_path):
    preflight = sarqc.estimate(models["qwen3_moe"], tmp_path / "out", **SMALL)
    assert preflight.bits_per_weight == pytest.approx(4.0) and "sensitivity" in preflight.time.seconds
    assert any("chosen after the first pass, out of 2, 3, 4, 5, 6, 8; 4 on average" in note for note in preflight.notes)
    kernels = {kernel for one in preflight.serve for kernel in one.kernels}
    assert "Humming or Marlin" in kernels or "Humming" in kernels
    assert all(one.failures for one in preflight.serve if one.server.startswith("SGLang"))
    marlin = sarqc.estimate(models["llama"], tmp_path / "out", **SMALL | {"avg_bits": 6.0, "bit_options": (4, 8)})
    assert not any(one.failures for one in marlin.serve if one.server.startswith("SGLang") and one.ranks == 1)


def test_every_option_reaches_the_run(models, tmp_path):
    words = ["quantize", str(models["qwen3_moe"]), "-o", str(tmp_path / "out"), "--avg-bits", "4", "--bit-options"]
    words += [
        "3,4,8",
        "--group-size",
        "32",
        "--num-samples",
        "4",
        "--seqlen",
        "32",
        "--expert-shrinkage",
        "0.5",
        "--router-weight-power",
    ]
    result = CliRunner().invoke(app, [*words, "2", "--no-error-correction", "--json"])
    assert result.exit_code == 0, result.output
    report = reports.load(tmp_path / "out")
    assert report["quant"]["bit_options"] == [3, 4, 8]
    assert (
        report["method"]["expert_shrinkage"],
        report["method"]["router_weight_power"],
        report["method"]["error_correction"],
    ) == (
        0.5,
        2,
        False,
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--expert-shrinkage 0.5 --router-weight-power 2" in card
    refused = CliRunner().invoke(app, [*words[:7], "3,x"])
    assert refused.exit_code != 0 and "bit_options = '3,x'" in str(refused.exception) + refused.output

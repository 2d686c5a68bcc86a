"""What is said before a run, against what the run then does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sarqc
from sarqc.checkpoint.shards import SINGLE
from sarqc.cli.preflight import show
from sarqc.cli.terminal import RunProgress
from sarqc.entrypoints.estimate import estimate
from sarqc.errors import ArgumentError, ModelError, ResourceError
from sarqc.estimation.preflight import Preflight
from sarqc.serving.rules import RuntimeSupport
from tests.support import families, kept, tiny

SMALL = {"num_samples": 2, "seqlen": 32, "group_size": 32}
MEMORY_FACTOR, TIME_FACTOR = 2.0, 4.0
"""How far an estimate may be off. Of time it is half as much on a quiet machine; a changing clock, and other work,
change rates between the probe and the run."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny.save(kind, folder / kind) for kind in ("llama", "qwen3_moe", "deepseek_v3")}


@pytest.mark.parametrize(
    ("kind", "quant"),
    [
        ("llama", {"group_size": -1, "method": "rtn"}),
        ("qwen3_moe", {}),
        ("deepseek_v3", {"bits": 3, "sym": False, "method": "rtn"}),
    ],
)
def test_sizes_are_those_of_the_run(sources, tmp_path, kind, quant):
    settings = SMALL | quant
    preflight = estimate(sources[kind], tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []
    result = kept.quantize(sources[kind], tmp_path / "out", **settings)
    assert preflight.sizes.output == result.report["size"]["bytes"]
    assert preflight.bits_per_weight == pytest.approx(result.report["size"]["bits_per_weight"], abs=1e-3)
    assert preflight.quantized_linears == result.report["targets"]["quantized"]
    assert preflight.sites >= len(result.report["sites"])
    # the shards of the output were those of the work folder
    folders = (result.out, tmp_path / ".out.work")
    stored = sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))
    headers = 400 * preflight.quantized_linears * 3 + 50_000
    assert preflight.sizes.work - preflight.sizes.hidden <= stored <= preflight.sizes.work + headers


def test_a_configuration_is_enough(sources, tmp_path):
    for kind, source in sources.items():
        bare = tmp_path / kind
        bare.mkdir()
        shutil.copy(source / "config.json", bare)
        whole, outline = estimate(source, tmp_path / "out", **SMALL), estimate(bare, tmp_path / "out", **SMALL)
        assert outline.kinds == whole.kinds and outline.serve == whole.serve
        # transformers 5.24 would save DeepSeek's routers in fp32, where these and published ones have bf16
        assert asdict(outline.sizes) == pytest.approx(asdict(whole.sizes), rel=0.005)
        with pytest.raises(sarqc.SarqcError, match="safetensors"):
            sarqc.quantize(bare, tmp_path / "out", **SMALL)


@pytest.mark.parametrize("row", ["gemma3+vl", "gpt_oss", "granitemoehybrid", "kimi_linear", "deepseek_v4", "gpt2"])
def test_a_configuration_is_enough_for_each_kind_of_model(row, tmp_path):
    """A wrapper, experts in one tensor, joined convolutions, selectors and transposed matrices."""
    source, bare = families.save(row, tmp_path / "in"), tmp_path / "bare"
    bare.mkdir()
    shutil.copy(source / "config.json", bare)
    whole, outline = (estimate(folder, tmp_path / "out", **SMALL) for folder in (source, bare))
    assert outline.kinds == whole.kinds and outline.serve == whole.serve
    assert outline.quantized_linears == whole.quantized_linears > 0


def test_a_model_on_a_hub_is_known_by_its_headers(sources, tmp_path, monkeypatch):
    """The hub is a stand-in: a folder with configuration, and headers in its client's own types."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    source = sources["llama"]
    asked = []

    def snapshot_download(hub_id, revision, allow_patterns, ignore_patterns):
        asked.append((hub_id, allow_patterns))
        return source

    from sarqc.checkpoint.reader import open_checkpoint

    checkpoint = open_checkpoint(source)
    tensors = {name: TensorInfo("BF16", list(checkpoint.shape(name)), (0, 0)) for name in checkpoint.names()}
    file = SafetensorsFileMetadata(metadata={}, tensors=tensors)
    repo = SafetensorsRepoMetadata(None, False, dict.fromkeys(tensors, "a"), {"a": file})
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(HfApi, "get_safetensors_metadata", lambda self, hub_id, revision: repo)
    preflight = estimate("owner/name", tmp_path / "out", **SMALL)
    assert preflight.sizes == estimate(source, tmp_path / "out", **SMALL).sizes
    assert asked[0][0] == "owner/name" and "*.safetensors" not in asked[0][1]


def test_what_its_configuration_refuses_is_refused_before_weights_are_fetched(sources, tmp_path, monkeypatch):
    """Weights may be hundreds of GB."""
    config = json.loads((sources["llama"] / "config.json").read_text())
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "exl2"}})
    )
    asked = []

    def snapshot_download(hub_id, revision, allow_patterns, ignore_patterns):
        asked.extend(allow_patterns)
        return tmp_path / "hub"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for ask in (partial(estimate, **SMALL), partial(sarqc.quantize, **SMALL), sarqc.compare):
        with pytest.raises(sarqc.SarqcError, match=r"quantized already, with quant_method 'exl2', which is not read"):
            ask("owner/name", tmp_path / "out")
    assert "*.json" in asked and "*.safetensors" not in asked


@pytest.mark.parametrize("reachable", [True, False])
def test_what_headers_refuse_is_refused_before_weights_are_fetched(sources, tmp_path, monkeypatch, reachable):
    """Experts that no method takes, or a group size that does not fit. Without headers, as for what was fetched before
    and there is no network now, a run goes on to the weights."""
    from huggingface_hub import HfApi

    from sarqc.checkpoint.reader import open_checkpoint
    from sarqc.pipeline import plan

    asked = []
    whole = plan.hub_headers

    def unreachable(self, hub_id, revision):
        raise RuntimeError("[Errno 111] Connection refused")

    def snapshot_download(hub_id, revision, allow_patterns, ignore_patterns):
        asked.extend(allow_patterns)
        return sources["llama"]

    def headers(hub_id):
        if not reachable:
            return whole(hub_id)
        checkpoint = open_checkpoint(sources["llama"])
        return {name: (checkpoint.shape(name), checkpoint.dtype(name)) for name in checkpoint.names()}

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(HfApi, "get_safetensors_metadata", unreachable)
    monkeypatch.setattr(plan, "hub_headers", headers)
    with pytest.raises(ArgumentError, match="group_size = 48 does not divide"):
        sarqc.quantize("owner/name", tmp_path / "out", **SMALL | {"group_size": 48})
    assert ("*.safetensors" in asked) is not reachable


def test_disk_is_asked_for_what_will_be_written(sources, tmp_path, monkeypatch):
    """Shards are renamed; copied into one file, converted by way of a spool, or copied to another file system."""
    module = sys.modules[Preflight.__module__]

    def needed(**how):
        preflight = estimate(sources["llama"], tmp_path / "out", **SMALL | how)
        return sum(one.needed for one in preflight.disk) - preflight.sizes.work - module._SPARE, preflight.sizes.output

    merged, output = needed()
    assert merged == output
    monkeypatch.setattr(module, "MERGE_BYTES", 0)
    assert needed()[0] == 0
    converted, output = needed(format="gptq")
    assert converted == 2 * output
    monkeypatch.setattr(module, "SHARD_BYTES", 1000)
    assert needed(format="gptq")[0] == output + 1000
    memory = Path("/dev/shm")
    if memory.is_dir() and memory.stat().st_dev != tmp_path.stat().st_dev:
        result, output = needed(work_dir=memory / "sarqc-test-work")
        assert result == output


def test_text_that_is_here_is_counted_and_text_that_is_not_refused(sources, tmp_path):
    """A dry run that says yes to a text that is not there would be of no use."""
    few = tmp_path / "few.txt"
    few.write_text("a few words of text " * 60)
    how = {key: value for key, value in SMALL.items() if key not in ("num_samples", "dataset")}
    preflight = estimate(sources["llama"], tmp_path / "out", dataset=str(few), **how)
    assert 0 < preflight.windows < 128
    with pytest.raises(sarqc.SarqcError, match=r"gone\.txt.*no such file"):
        estimate(sources["llama"], tmp_path / "out", dataset=str(tmp_path / "gone.txt"), **how)


def test_what_is_left_is_said_with_the_reason(sources, tmp_path):
    preflight = estimate(sources["qwen3_moe"], tmp_path / "out", ignore=["o_proj$"], **SMALL)
    left = {kind.name: (kind.count, kind.left) for kind in preflight.kinds if kind.left}
    assert left == {
        "model.layers.*.self_attn.o_proj": (2, "ignore o_proj$"),
        "model.layers.*.mlp.gate": (2, "its outputs choose experts or positions"),
        "lm_head": (1, "outside the blocks"),
    }


def test_half_of_a_fused_layer_is_seen(sources, tmp_path):
    preflight = estimate(sources["llama"], tmp_path / "out", ignore=["up_proj$"], **SMALL)
    vllm = next(one for one in preflight.serve if one.ranks == 1)
    assert vllm.failures == ("model.layers.*.mlp.gate_proj+up_proj: only a part of what is fused here is quantized",)


def test_ranks_that_no_server_takes_are_refused_before_the_run(sources, tmp_path):
    with pytest.raises(ResourceError, match=r"tp = 4: vLLM.*o_proj: 16 inputs on each rank.*group size 32"):
        sarqc.quantize(sources["llama"], tmp_path / "out", tp=4, **SMALL)
    assert list(tmp_path.iterdir()) == []
    sarqc.quantize(sources["llama"], tmp_path / "out", tp=2, **SMALL)
    with pytest.raises(ArgumentError, match="tp = 0"):
        estimate(sources["llama"], tmp_path / "out", tp=0)


def test_the_first_look_is_counted_where_there_is_one(sources, tmp_path):
    def stages(**how):
        preflight = estimate(sources["qwen3_moe"], tmp_path / "out", **SMALL | {"method": "gptq"} | how).memory
        return {stage.stage: stage.host for stage in preflight}

    assert "sensitivity" not in stages()
    mixed = stages(avg_bits=4.5)
    order = list(mixed)
    assert mixed["sensitivity"] >= mixed["solve"] - (1 << 20)
    assert order.index("sensitivity") < order.index("forward")


def test_too_little_memory_is_refused(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("sarqc.estimation.preflight.host_memory", lambda: 1 << 20)
    with pytest.raises(ResourceError, match=r"of memory, this machine has 1\.0 MB: lower --gram-budget"):
        sarqc.quantize(sources["llama"], tmp_path / "out", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_unknown_settings_and_models_are_one_line(sources, tmp_path):
    with pytest.raises(ArgumentError, match="bitz"):
        estimate(sources["llama"], tmp_path / "out", bitz=4)
    with pytest.raises(ModelError, match="no such folder"):
        estimate("no/such/model", tmp_path / "out")


def test_everything_is_json_and_fits_a_terminal(sources, tmp_path, capsys):
    from rich.console import Console

    preflight = estimate(sources["qwen3_moe"], tmp_path / "out", **SMALL)
    again = json.loads(json.dumps(preflight.to_json(), allow_nan=False))
    assert again["output_bytes"] == preflight.sizes.output and again["time"]["basis"] == preflight.time.basis
    assert {one["server"] for one in again["serve"]} == {one.server for one in preflight.serve}
    show(Console(width=120), preflight)
    shown = capsys.readouterr().out
    assert "basis:" in shown and "Humming MoE" in shown and "experts.*.down_proj" in shown


def test_brackets_in_names_and_patterns_are_shown_as_they_are(sources, tmp_path, capsys):
    """For rich they are markup, and `[/]` alone would end the command in a traceback."""
    from rich.console import Console

    model = shutil.copytree(sources["llama"], tmp_path / "a[bold]b")
    preflight = estimate(model, tmp_path / "out[dim]", ignore=["[ok]_proj[/]?$"], **SMALL)
    show(Console(width=300), preflight)
    shown = capsys.readouterr().out
    assert "a[bold]b" in shown and "out[dim]" in shown and "ignore [ok]_proj[/]?$" in shown
    with RunProgress(Console()) as progress:
        progress.note("work[/] in [dim]")
        progress.follow("tensors")(1, 1, "x[/]")
    assert capsys.readouterr().out == "work[/] in [dim]\ntensors 1/1: x[/], 0:00 left\n"


def test_the_server_that_refuses_is_named(sources, tmp_path, capsys):
    from rich.console import Console

    preflight = estimate(sources["llama"], tmp_path / "out", **SMALL)
    alone = [RuntimeSupport("SGLang", ranks, {}, ("head: no kernel",)) for ranks in (1, 2)]
    all_of_two = [RuntimeSupport(server, 4, {}, ("9 heads",)) for server in ("vLLM", "SGLang")]
    runs = [RuntimeSupport("vLLM", ranks, {"Marlin": 7}, ()) for ranks in (1, 2)]
    for serve in (runs + alone, runs + alone + all_of_two):
        show(Console(width=300), replace(preflight, serve=tuple(serve)))
        assert "fails head: no kernel  SGLang at tp 1, 2\n" in capsys.readouterr().out


MEASURE = """
import json, sys, time
time.perf_counter = time.process_time  # of the one thread, whatever else this machine does
import sarqc
from sarqc.entrypoints.estimate import estimate
settings = dict(num_samples=8, seqlen=128, group_size=64)
forecast = estimate(sys.argv[1], sys.argv[2], **settings)
report = sarqc.quantize(sys.argv[1], sys.argv[2], **settings).report
peak = report["peak_memory_mib"]["host"] << 20
print(json.dumps([max(stage.host for stage in forecast.memory), peak, forecast.time.total, report["seconds"]["total"]]))
"""


@pytest.mark.slow
def test_estimates_are_near_what_a_run_takes(tmp_path):
    wide = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, num_key_value_heads=8, head_dim=128)
    source = tiny.save("llama", tmp_path / "model", dtype=torch.float32, **wide)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    memory, peak, seconds, spent = json.loads(done.stdout)
    assert peak / MEMORY_FACTOR < memory < peak * MEMORY_FACTOR, (memory, peak)
    assert spent / TIME_FACTOR < seconds < spent * TIME_FACTOR, (seconds, spent)


def test_packed_weights_on_a_hub_are_known_by_the_configuration(tmp_path, monkeypatch):
    """Their headers do not say what they stand for; a run would fetch hundreds of GB, or refuse them before."""
    from sarqc.pipeline import plan

    source = families.rounded(families.save("qwen3_moe", tmp_path / "in"), tmp_path / "packed")
    headers = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in load_file(source / SINGLE).items()}
    monkeypatch.setattr(plan, "hub_configuration", lambda *_, **how: source)
    monkeypatch.setattr(plan, "hub_headers", lambda _: headers)
    whole, outline = (estimate(model, tmp_path / "out", **SMALL) for model in (source, "owner/name"))
    assert outline.kinds == whole.kinds and outline.serve == whole.serve


def test_a_pickle_is_refused_by_a_dry_run_and_taken_once_it_is_converted(sources, tmp_path):
    """With what the refusal advises."""
    from transformers import AutoModelForCausalLM

    pickled = shutil.copytree(sources["llama"], tmp_path / "in")
    torch.save(load_file(pickled / SINGLE), pickled / "pytorch_model.bin")
    (pickled / SINGLE).unlink()
    for ask in (estimate, sarqc.quantize):
        with pytest.raises(sarqc.SarqcError, match=r"'pytorch_model\.bin'.*convert .*\(save_pretrained"):
            ask(pickled, tmp_path / "out", **SMALL)
    AutoModelForCausalLM.from_pretrained(pickled, dtype="auto").save_pretrained(tmp_path / "converted")
    result, wanted = (
        sarqc.quantize(source, tmp_path / name, **SMALL | {"method": "rtn"}).out
        for name, source in (("a", tmp_path / "converted"), ("b", sources["llama"]))
    )
    assert (result / SINGLE).read_bytes() == (wanted / SINGLE).read_bytes()

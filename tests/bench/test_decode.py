"""The decode benchmark: its step is transformers' step, its bytes and flops are those by hand, wrong is not timed."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from benchmarks import records, run
from benchmarks.decode import command, model
from benchmarks.quantize.shapes import config_of
from sarqc.model.generate import cache_name
from sarqc.model.packed_linear import PackedWeight
from sarqc_kernels.w4a16 import cpu

CPU = torch.device("cpu")


def test_a_quick_run_times_every_model_at_every_batch(tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    assert run.main(["decode", "--quick", "--skip-tests", "--device", "cpu", "--out", str(out)]) == 0
    result = records.read(out)
    assert {record["status"] for record in result} == {"timed"} and len(result) == 2 * 3 * 3
    for record in result:
        rate = record["sizes"]["batch"] / record["seconds"]["p50"]
        assert record["tokens_per_second"] == pytest.approx(rate) and record["op"] == "decode"
        assert record["ours"] == (record["error"] is not None)
        assert record["share"] == pytest.approx(record["roof_seconds"] / record["seconds"]["p50"])
    traffic = {record["contender"]: record["traffic"] for record in result if record["point"] == "small batch 1"}
    assert traffic["sarqc W4"] < 0.5 * traffic["transformers bf16"]
    assert "small-moe batch 64: sarqc W4" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["small", "small-moe"])
@pytest.mark.parametrize("bits", [None, 3])
def test_a_step_is_that_of_transformers_with_its_own_cache(shape, bits):
    made = model.made(shape, bits, CPU)
    context = model.Context(made.config, 2, 9, CPU)
    theirs = DynamicCache(config=made.config)
    for layer in range(made.config.num_hidden_layers):
        theirs.update(context.keys[layer, :, :, :-1].clone(), context.values[layer, :, :, :-1].clone(), layer)
    call = model.step(made, context)
    logits = call()
    ids = torch.randint(made.config.vocab_size, (2, 1), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = made(input_ids=ids, use_cache=True, **{cache_name(made): theirs}).logits
    assert torch.equal(logits, expected)
    assert torch.equal(call(), logits)  # again and again: a step leaves the context as it found it


def test_bytes_by_hand():
    """Every expert is hit by many tokens; of the table only their rows count."""
    made = model.made("small-moe", 4, CPU)
    packed = [module for module in made.modules() if isinstance(module, PackedWeight)]
    assert {module.group_size for module in packed} == {64} and {module.bits for module in packed} == {4}
    batch, length = 1000, 3
    config = made.config
    every = {t.data_ptr(): t.numel() * t.element_size() for t in (*made.parameters(), *made.buffers()) if t.numel()}
    table = 2 * config.vocab_size * config.hidden_size
    keys = 2 * 2 * config.num_hidden_layers * batch * config.num_key_value_heads * length * config.head_dim
    wanted = sum(every.values()) - table + 2 * batch * config.hidden_size + keys
    assert model.bytes_of(made, model.Context(config, batch, length, CPU)) == pytest.approx(wanted, rel=1e-6)
    alone = model.bytes_of(made, model.Context(config, 1, length, CPU))
    experts = sum(2 * m.words.numel() // 2 for m in packed if m.words.shape[0] > 1)
    assert alone < wanted - keys - 0.7 * experts  # 2 of 8 are hit


def test_flops_of_llama():
    """8.03 billion parameters, of which the table of 128256 x 4096 is not multiplied with."""
    flops = model.flops_of(config_of("llama-3-8b", None), 1, 1024)
    weights, attention = 8.03e9 - 128256 * 4096, 2 * 32 * 32 * 128 * 1024
    assert flops == pytest.approx(2 * (weights + attention), rel=1e-3)


def test_a_wrong_product_is_not_timed(monkeypatch, tmp_path):
    right = cpu._expert
    monkeypatch.setattr(cpu, "_expert", lambda *args: -right(*args))
    out = tmp_path / "r.jsonl"
    arguments = ["--shape", "small", "--batch", "1", "--quick", "--skip-tests", "--device", "cpu", "--out", str(out)]
    command.main(arguments)
    status = {record["contender"]: record["status"] for record in records.read(out)}
    assert status == {"sarqc W4": "wrong", "sarqc W3": "wrong", "transformers bf16": "timed"}


def test_a_model_is_judged_once_at_its_smallest_batch(monkeypatch, tmp_path):
    """The reference may take minutes of launches on a card; larger batches are left to the tests of the kernels."""
    evaluated = []
    right = command._error
    monkeypatch.setattr(command, "_error", lambda call: evaluated.append(len(call())) or right(call))
    out = tmp_path / "r.jsonl"
    arguments = ["--shape", "small", "--batch", "3", "--batch", "2", "--quick", "--skip-tests", "--device", "cpu"]
    command.main([*arguments, "--out", str(out)])
    assert evaluated == [2, 2]  # W4 and W3
    errors = {(r["point"], r["contender"]): r["error"] for r in records.read(out)}
    for name in ("sarqc W4", "sarqc W3"):
        assert errors["small batch 2", name] == errors["small batch 3", name] < command.MOST_ERROR


def test_what_cannot_be_made_or_has_no_time_is_listed(monkeypatch, tmp_path):
    made = model.made

    def out_of_memory(shape, bits, device):
        if bits is None:
            raise RuntimeError("CUDA out of memory\nand more")
        return made(shape, bits, device)

    monkeypatch.setattr(model, "made", out_of_memory)
    out = tmp_path / "r.jsonl"
    arguments = ["--shape", "small", "--batch", "1", "--batch", "8", "--quick", "--skip-tests", "--device", "cpu"]
    command.main([*arguments, "--out", str(out)])
    failed = records.of_status(records.read(out), "failed")
    assert [(r["point"], r["contender"], r["reason"]) for r in failed] == [
        (f"small batch {batch}", "transformers bf16", "CUDA out of memory") for batch in (1, 8)
    ]
    command.main([*arguments, "--out", str(out), "--minutes", "0.001"])
    assert {record["status"] for record in records.read(out)} == {"left out"}

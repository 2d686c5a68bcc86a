"""`python -m benchmarks.run quantize`: where the time of a whole run goes, and how long the whole model would take."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, records
from benchmarks.budget import Budget
from benchmarks.quantize.shapes import MODELS, config_of, tensors_of
from benchmarks.quantize.source import RandomSource
from benchmarks.quantize.stopwatch import OpTimes
from sarqc.checkpoint.formats import FORMATS
from sarqc.checkpoint.state import write_shard
from sarqc.config import MethodConfig, QuantConfig
from sarqc.model.lazy_model import LazyModel
from sarqc.pipeline import driver
from sarqc.pipeline.execution import Execution
from sarqc.system import peak_memory_mib

BY_DEVICE = {"cuda": (("llama-3-8b", "qwen3-30b-a3b"), 512, 2048), "cpu": (("small", "small-moe"), 4, 128)}


@dataclass(frozen=True)
class Run:
    """One model to quantize. blocks: how many of it; None for all, as far as time goes."""

    model: str
    blocks: int | None
    windows: int
    seqlen: int
    method: str
    bits: int
    group_size: int


@dataclass
class Spent:
    """Seconds by what they went to, and the blocks that were done."""

    seconds: dict[str, float] = field(default_factory=dict)
    blocks: int = 0

    @contextmanager
    def on(self, name: str) -> Any:
        """Adds the time of the context to `name`."""
        began = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        """Some seconds more."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    device, budget = machine.device_of(options.device), Budget(options.minutes)
    models, windows, seqlen = BY_DEVICE[device.type]
    out = options.out or machine.place(device, options.quick)
    sink = records.Sink(out, {**machine.facts(device, options.commit), "tested": False, "quick": options.quick})
    names = options.model or list(models)
    if options.quick:
        names, windows, seqlen = options.model or ["small", "small-moe"], 2, 64
    for number, name in enumerate(names):
        run = Run(name, options.blocks, options.windows or windows, options.seqlen or seqlen, options.method,
                  options.bits, options.group_size)  # fmt: skip
        share = Budget(budget.left() / 60 / (len(names) - number), first_guess=1.0)
        shown = measure(run, device, options.folder, share, sink)
        print(f"[{budget}] {shown}", flush=True)
    print(f"[{budget}] {out}", flush=True)
    return 0


def measure(run: Run, device: torch.device, folder: Path | None, budget: Budget, sink: records.Sink) -> str:
    """Quantize and write block after block until the model or the time is at its end; what to show of where it went.

    Each block leaves a record of all until then, in place of the one before: a run that is ended keeps what it has.

    folder: what is written goes into a folder of its own in here (None: the temporary folder), and away at the end.
    """
    # One block more than is measured: the last of a model is not run forward through its quantized weights.
    config = config_of(run.model, None if run.blocks is None else run.blocks + 1)
    source = RandomSource(tensors_of(config))
    lazy = LazyModel.from_config(config, source)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (run.windows, run.seqlen), generator=generator)
    quant, spent = QuantConfig(bits=run.bits, group_size=run.group_size), Spent()
    form = FORMATS["compressed-tensors"]
    target = Path(tempfile.mkdtemp(prefix="sarqc-bench-", dir=folder))
    # On a card what the user gets there, the checkpoint's dtype; on a CPU fp32, as `sarqc quantize` takes by itself.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    began, shown = time.perf_counter(), f"{run.model}: no time was left"
    try:
        with OpTimes(device) as ops:
            results = driver.run(lazy, source, tokens, quant, MethodConfig(run.method), Execution(device, dtype))
            while (run.blocks is None or spent.blocks < run.blocks) and budget.has_time():
                with budget.step():
                    result = next(results, None)
                    if result is None:
                        break
                    _write(result, form, quant, target, spent)
                spent.blocks += 1
                for stage, seconds in result.seconds.items():
                    spent.add(stage, seconds)
                record = _record(run, config, spent, ops.seconds(), time.perf_counter() - began)
                sink.add(record)
                shown = _shown(record)
            results.close()
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return shown


def _write(result: driver.BlockResult, form: Any, quant: QuantConfig, folder: Path, spent: Spent) -> None:
    packed = {}
    with spent.on("pack"):
        for linear, weight in result.weights.items():
            packed |= form.pack(linear, weight, quant)
    with spent.on("disk"):
        write_shard(folder / f"{result.index:05d}.safetensors", packed)


def _record(run: Run, config: Any, spent: Spent, by_op: dict[str, float], total: float) -> dict[str, Any]:
    stages, done = spent.seconds, spent.blocks
    passed = sum(stages.get(name, 0.0) for name in ("reference", "forward"))  # Grams are summed on the way
    inside = sum(by_op[name] for name in ("columns", "factor", "grids", "finalize"))
    seconds = {
        "load": stages.get("load", 0.0),
        "forward": max(0.0, passed - by_op["gram"]),
        **by_op,
        "solve, the rest": max(0.0, stages.get("solve", 0.0) - inside),
        "pack": stages.get("pack", 0.0),
        "disk": stages.get("disk", 0.0),
    }
    seconds["embeddings and the rest"] = max(0.0, total - sum(seconds.values()))
    layers = MODELS[run.model][1]["num_hidden_layers"]
    once = seconds["embeddings and the rest"]
    return {
        "status": "run", "op": "quantize", "point": f"{run.model} {run.windows} x {run.seqlen}", "contender": "sarqc",
        "model": run.model, "windows": run.windows, "seqlen": run.seqlen, "method": run.method, "bits": run.bits,
        "group_size": run.group_size, "blocks": spent.blocks, "layers": layers, "seconds": seconds,
        "total_seconds": total, "whole_model_seconds": once + (total - once) / done * layers,
        "peak_memory_mib": peak_memory_mib(),
    }  # fmt: skip


def _shown(record: dict[str, Any]) -> str:
    total = record["total_seconds"]
    shares = sorted(record["seconds"].items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in shares if seconds >= 0.005 * total)
    done = f"{record['blocks']} of {record['layers']} blocks in {total:.1f} s"
    return f"{record['point']}: {done} (all would take {record['whole_model_seconds']:.0f} s): {parts}"


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run quantize", description=__doc__)
    parser.add_argument("--model", action="append", choices=MODELS, help="again for more; default by the device")
    parser.add_argument("--blocks", type=int, help="only the first N decoder blocks")
    parser.add_argument("--windows", type=int, help="of calibration (random tokens); 512 on a card, 4 on a CPU")
    parser.add_argument("--seqlen", type=int, help="tokens of a window; 2048 on a card, 128 on a CPU")
    parser.add_argument("--method", default="sarqc-gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="disk to write to; default the temporary folder")
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument("--out", type=Path, help="file to append the records to")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="what to record where there is no git")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

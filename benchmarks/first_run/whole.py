"""Whole runs as a user starts them, on models made here: `python -m benchmarks.first_run.whole --out FILE`.

A dense model and one with experts, of random weights, are saved, quantized to the last block by `sarqc.quantize`, and
loaded again with packed weights. A run passes where its layers' error is below that of round-to-nearest and the logits
of the packed model are those of its plain torch reference. One record for each, seconds by stage, as `sarqc` reports
them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import sarqc
from benchmarks import machine, records
from benchmarks.decode.command import MOST_ERROR
from benchmarks.decode.model import by_reference
from benchmarks.quantize.shapes import MODELS, config_of
from sarqc.checkpoint.reader import open_checkpoint
from sarqc.model.build import build
from sarqc.model.lazy_model import LazyModel

BY_SIZE = {False: (("smollm2-135m", "moe-500m"), 64, 1024), True: (("small", "small-moe"), 4, 64)}
"""Models, sequences of calibration and their tokens, of a run that is quick and of one that is not."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = machine.device_of(options.device)
    models, windows, seqlen = BY_SIZE[options.quick or device.type == "cpu"]
    sink = records.Sink(options.out, {**machine.facts(device), "tested": False, "quick": options.quick})
    wrong = 0
    for model in models:
        with tempfile.TemporaryDirectory(prefix="sarqc-whole-") as folder:
            record = run(model, windows, seqlen, device, Path(folder) / "quantized")
        sink.add(record)
        stages = ", ".join(f"{stage} {seconds:.3g}" for stage, seconds in record["seconds"].items())
        print(f"{record['point']}: {record['total_seconds']:.1f} s: {stages}", flush=True)
        print(f"error {record['error']:.3g}, rtn {record['rtn_error']:.3g}, logits {record['logits_error']:.3g}")
        wrong += not (record["error"] < record["rtn_error"] and record["logits_error"] <= MOST_ERROR)  # NaN is neither
    return int(wrong > 0)


def run(model: str, windows: int, seqlen: int, device: torch.device, out: Path) -> dict[str, Any]:
    """Make, quantize and load one model; its record."""
    config = config_of(model, None)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (windows, seqlen), generator=generator)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    result = sarqc.quantize(made, out, dataset=tokens, num_samples=windows, seqlen=seqlen, device=str(device))
    stages = {stage: spent for stage, spent in result.report["seconds"].items() if stage != "total"}
    layers = MODELS[model][1]["num_hidden_layers"]
    return {
        "status": "run", "op": "whole", "point": f"{model} {windows} x {seqlen}", "contender": "sarqc", "model": model,
        "windows": windows, "seqlen": seqlen, "blocks": layers, "layers": layers, "seconds": stages,
        "total_seconds": result.seconds, "whole_model_seconds": result.seconds, "error": result.error,
        "rtn_error": result.rtn_error, "logits_error": _logits_error(out, tokens[:1], device),
    }  # fmt: skip


@torch.inference_mode()
def _logits_error(folder: Path, tokens: torch.Tensor, device: torch.device) -> float:
    """Relative, of the packed model's logits against those of its reference."""
    checkpoint = open_checkpoint(folder)
    lazy = LazyModel.from_folder(folder, checkpoint)
    packed = build(lazy, checkpoint, device=device, dtype=lazy.dtype, packed=True)
    actual = packed(tokens.to(device)).logits.float()
    with by_reference():
        right = packed(tokens.to(device)).logits.float()
    return float((actual - right).norm() / right.norm())


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_run.whole", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file to append the records to")
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

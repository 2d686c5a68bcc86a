"""Is the lambda that a run chooses as good as the best one, chosen with the test text in hand?

    python -m benchmarks.quality.lambda_search MODEL results.jsonl --calibration wiki=calibration.txt \
        --evaluation wiki=evaluation.txt --evaluation python=builtin \
        --case 3:4:0 --case 3:16:0 --set reg_lambda=auto --set reg_lambda=0.3 --set expert_shrinkage=0.25 ...

A case is BITS:WINDOWS:SEED; with a decimal point in BITS layers get widths of that average, with scales. Windows of
--seqlen tokens are drawn from the calibration text with the seed. Each --set is a run: fields of `MethodConfig`, with
commas between them. Judged on --eval-windows windows of each text, evenly spaced. Every run adds a line of JSON:
perplexities, seconds of each stage, and of each kind of site its lambdas, bit-widths and correction shares.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sarqc.checkpoint.reader import Checkpoint, open_checkpoint
from sarqc.config import MethodConfig, QuantConfig
from sarqc.model import dataset
from sarqc.model.calibration_data import windows as windows_of
from sarqc.model.hub import locate
from sarqc.model.layers import targets
from sarqc.model.lazy_model import LazyModel
from sarqc.model.perplexity import perplexity
from sarqc.model.sites import write_back
from sarqc.model.tokenizer import load_tokenizer
from sarqc.options import options
from sarqc.pipeline import driver
from sarqc.pipeline.bit_allocation import choose
from sarqc.pipeline.execution import Execution
from sarqc.pipeline.sensitivity import measure_sensitivity


def fields(text: str) -> MethodConfig:
    """`reg_lambda=0.3,expert_shrinkage=0.25` as a configuration; words, numbers and true or false."""
    values: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, value = pair.split("=", 1)
        values[name] = options(MethodConfig)[name].read(name, value)
    return MethodConfig(**values)


def evenly(windows: dataset.Windows, count: int) -> dataset.Windows:
    """`count` windows, evenly spaced over the text."""
    at = torch.linspace(0, len(windows.tokens) - 1, min(count, len(windows.tokens))).long()
    return dataset.Windows(windows.tokens[at], windows.bos, windows.text, windows.available)


@torch.no_grad()
def quantized(
    folder: Path, tokens: torch.Tensor, quant: QuantConfig, method: MethodConfig, stop: int | None
) -> tuple[Any, list[Any]]:
    """The model with the weights of its first blocks replaced by what they dequantize to, in fp32, and the results."""
    checkpoint = open_checkpoint(folder)
    lazy = LazyModel.from_folder(folder, checkpoint)
    by_name = {target.linear: target for target in targets(lazy, quant).selected}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    results = []
    given = tokens if method.calibrated else None
    bit_widths = allocated(lazy, checkpoint, tokens, quant, method) if quant.avg_bits is not None else None
    run = driver.run(lazy, checkpoint, given, quant, method, Execution(dtype=torch.float32, bit_widths=bit_widths))
    for result in islice(run, stop):
        for linear, weight in result.weights.items():
            write_back(model, by_name[linear], weight)
        result.weights.clear()
        results.append(result)
    return model, results


def allocated(
    lazy: LazyModel, checkpoint: Checkpoint, tokens: torch.Tensor, quant: QuantConfig, method: MethodConfig
) -> dict[str, int]:
    """Bits of each Linear, as a run chooses them."""
    sites = measure_sensitivity(
        lazy,
        checkpoint,
        targets(lazy, quant),
        tokens,
        quant,
        method,
        Execution(dtype=torch.float32),
    )
    chosen = choose([site for _, site in sites], quant)
    print(chosen.headline(), flush=True)
    return chosen.by_linear()


def record(results: list[Any]) -> dict[str, Any]:
    """Seconds of the stages, and of each kind of site its lambdas, bit-widths and correction shares over depth."""
    totals: dict[str, Any] = {"seconds": {}, "reg_lambda": {}, "correction_share": {}, "widths": {}, "error": 0.0}
    reports = [report for result in results for report in result.reports]
    for result in results:
        for stage, seconds in result.seconds.items():
            totals["seconds"][stage] = round(totals["seconds"].get(stage, 0.0) + seconds, 1)
    for report in reports:
        kind = report.held_out.get("kind", "")
        totals["reg_lambda"].setdefault(kind, []).append(round(report.reg_lambda, 2))
        totals["widths"].setdefault(kind, []).append(report.bits)
        totals["correction_share"].setdefault(kind, []).append(round(report.correction_share, 2))
    totals["error"] = sum(report.error for report in reports) / len(reports)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("results", type=Path)
    parser.add_argument("--calibration", required=True, help="NAME=TEXT")
    parser.add_argument("--evaluation", action="append", required=True, help="NAME=TEXT")
    parser.add_argument("--case", action="append", required=True, help="BITS:WINDOWS:SEED")
    parser.add_argument("--set", action="append", required=True, help="fields of MethodConfig")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval-windows", type=int, default=4)
    parser.add_argument("--blocks", type=int, help="quantize only the first N (default: all)")
    args = parser.parse_args()
    folder = locate(args.model)
    tokenizer = load_tokenizer(folder)
    name, text = args.calibration.split("=", 1)
    calib = windows_of(text, lambda: tokenizer, args.seqlen)
    evaluated = {
        key: evenly(windows_of(text, lambda: tokenizer, args.seqlen, part="evaluation"), args.eval_windows)
        for key, text in (entry.split("=", 1) for entry in args.evaluation)
    }
    for case in args.case:
        bits, (windows, seed) = case.split(":")[0], map(int, case.split(":")[1:])
        width = {"avg_bits": float(bits)} if "." in bits else {"bits": int(bits)}
        quant = QuantConfig(group_size=args.group_size, **width)
        for setting in args.set:
            model, results = quantized(folder, calib.draw(windows, seed).tokens, quant, fields(setting), args.blocks)
            line = {
                "calibration": name,
                "bits": float(bits),
                "windows": windows,
                "seed": seed,
                "blocks": args.blocks,
                "set": setting,
            }
            line["perplexity"] = {key: round(perplexity(model, text).perplexity, 3) for key, text in evaluated.items()}
            print(line, flush=True)
            with args.results.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line | record(results)) + "\n")


if __name__ == "__main__":
    main()

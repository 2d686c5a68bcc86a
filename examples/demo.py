"""Quantize a real small model six ways, on a CPU, without a hub: `make demo`.

SmolLM2-135M-Instruct comes out of a Python package; text to calibrate and to judge on comes with Python itself (its
language reference, split by topic). The whole takes a few minutes.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import sarqc

OUT = Path("demo-output")
MODEL = "smollm2"
METHODS = ("rtn", "gptq", "sarqc-gptq")
BITS = (4, 3)
GROUP_SIZE = 64  # the model's 576 inputs are no multiple of 128
CALIBRATION = dict(dataset="builtin", num_samples=16, seqlen=512)
EVALUATION = dict(text="builtin", seqlen=512, max_windows=8, packed=False)

console = Console(stderr=True)


def perplexity(model: str | Path, dtype: str) -> float:
    """Perplexity on the part of the built-in text that is not for calibration, in the same arithmetic for every row."""
    with console.status(f"perplexity of {model}"):
        return sarqc.evaluate(model, dtype=dtype, **EVALUATION).perplexity


def quantize(method: str, bits: int) -> sarqc.Result:
    """One run."""
    out = OUT / f"smollm2-w{bits}-{method}"
    console.print(f"[bold]{method}[/] at {bits} bits")
    with sarqc.progress_bar() as bar:
        return sarqc.quantize(
            MODEL, out, method=method, bits=bits, group_size=GROUP_SIZE, overwrite=True, progress=bar, **CALIBRATION
        )


def row(
    method: str, bits: int, size: int, bits_per_weight: float, result: float, seconds: float | None
) -> dict[str, Any]:
    """One line of the table."""
    return {
        "method": method,
        "bits": bits,
        "bytes": size,
        "bits_per_weight": bits_per_weight,
        "perplexity": result,
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a person wants to see them."""
    shown = Table(title="SmolLM2-135M-Instruct, symmetric, groups of 64", title_justify="left")
    for heading in ("method", "bits", "size", "bits/weight", "perplexity", "seconds"):
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    for number, line in enumerate(rows):
        shown.add_row(
            line["method"],
            str(line["bits"]),
            f"{line['bytes'] / 1e6:.1f} MB",
            f"{line['bits_per_weight']:.3f}",
            f"{line['perplexity']:.2f}",
            "" if line["seconds"] is None else f"{line['seconds']:.0f}",
            end_section=number % len(METHODS) == 0,
        )
    return shown


def main() -> None:
    """Make the table, say a sentence, say where the checkpoints lie."""
    began = time.perf_counter()
    OUT.mkdir(exist_ok=True)
    console.print("reading SmolLM2-135M-Instruct (converted to an ordinary checkpoint the first time, half a minute)")
    done = {(method, bits): quantize(method, bits) for bits in BITS for method in METHODS}
    report = done[METHODS[-1], BITS[-1]].report
    dtype = report["dtype"]  # bf16 where this CPU multiplies it fast, else fp32
    rows = [row("unquantized", 16, report["source"]["bytes"], 16.0, perplexity(MODEL, dtype), None)]
    for (method, bits), run in done.items():
        reached = perplexity(run.out, dtype)
        rows.append(row(method, bits, run.size, run.bits_per_weight, reached, run.seconds))
    (OUT / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    best = OUT / f"smollm2-w4-{METHODS[-1]}"
    sentence = sarqc.generate(best, "The most important thing about a library is")
    stdout = Console()
    stdout.print(table(rows))
    stdout.print(f"\n[bold]{best.name} says:[/] {sentence}\n", highlight=False)
    stdout.print(f"The checkpoints lie in {OUT.resolve()}; this one in {best.resolve()}", soft_wrap=True)
    stdout.print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()

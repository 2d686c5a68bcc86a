"""What a run costs on this machine, beside one plain forward pass and a rival, in turns within one run.

    python -m benchmarks.speed MODEL TOKENS.safetensors results.json [--rounds 3] [--rival PYTHON] [--rival-dtype DTYPE]

Each is a process of its own, measured whole (imports, reading and writing included) by the operating system: wall and
CPU seconds and peak memory. --rival is the Python of the environment that `rivals/llmcompressor_oneshot.py` describes;
it is given the dtype that it is fastest in, float32 where the CPU has no bf16 products. Rounds are added to those of a
results file that exists, so a machine can be kept quiet for a round at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import device_of, facts
from sarqc.system import versions

RIVAL = Path(__file__).parent / "rivals" / "llmcompressor_oneshot.py"

FORWARD = """
import sys, time, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
tokens = load_file(sys.argv[2])["tokens"]
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.inference_mode():
    model(tokens[:1], use_cache=False)
    began = time.perf_counter()
    for window in tokens.split(1):
        model(window, use_cache=False)
    print(time.perf_counter() - began)
"""

QUANTIZE = """
import json, sys, sarqc
from safetensors.torch import load_file
tokens = load_file(sys.argv[2])["tokens"]
out = sys.argv[3] + "/out"
result = sarqc.quantize(sys.argv[1], out, bits=4, group_size=64, dataset=tokens, num_samples=len(tokens))
seconds = result.report["seconds"]
print(json.dumps({"wall_seconds": seconds["total"], "solve_seconds": seconds["solve"]}))
"""


def measure(command: list[str]) -> dict[str, float]:
    """Run to the end: seconds of wall and CPU, peak memory, and the last number it printed ("inner" seconds)."""
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        child = os.posix_spawn(
            command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, output.fileno(), 1)]
        )
        _, status, used = os.wait4(child, 0)
        wall = time.perf_counter() - began
        output.seek(0)
        last = output.read().decode().strip().splitlines()[-1:]
    if status or not last:
        raise SystemExit(f"{' '.join(command)[:200]} ended with status {status}")
    inner = json.loads(last[0])
    parts = inner if isinstance(inner, dict) else {"wall_seconds": inner}
    return {
        "wall_seconds": wall,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
        "inner_seconds": parts["wall_seconds"],
        **{name: parts[name] for name in ("solve_seconds",) if name in parts},
    }


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("results", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rival", help="Python of an environment with llm-compressor")
    parser.add_argument("--rival-dtype", choices=("auto", "float32"), default="auto")
    args = parser.parse_args()
    known = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {}
    runs: dict[str, list[dict[str, float]]] = known.get("runs", {})
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            inputs = [args.model, args.tokens]
            commands = {
                "forward": [sys.executable, "-c", FORWARD, *inputs],
                "sarqc": [sys.executable, "-c", QUANTIZE, *inputs, folder],
            }
            if args.rival:
                commands["llm-compressor"] = [
                    args.rival,
                    str(RIVAL),
                    *inputs,
                    f"{folder}/rival",
                    "--dtype",
                    args.rival_dtype,
                ]
            for name, command in commands.items():
                runs.setdefault(name, []).append(measure(command))
                print(name, runs[name][-1], flush=True)
    medians = {name: middle(measured) for name, measured in runs.items()}
    ours, forward = medians["sarqc"], medians["forward"]
    ratios: dict[str, Any] = {"run / forward": ours["inner_seconds"] / forward["inner_seconds"]}
    if rival := medians.get("llm-compressor"):
        ratios |= {f"rival / ours, {name}": seconds / ours[name] for name, seconds in rival.items()}
    ratios = {name: round(ratio, 2) for name, ratio in ratios.items()}
    record: dict[str, Any] = {
        "medians": medians,
        "ratios": ratios,
        "rival_dtype": args.rival_dtype,
        "runs": runs,
        "versions": versions(),
        "cpus": os.cpu_count(),
    }
    record["machine"] = facts(device_of("cpu"))
    args.results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"medians": medians, "ratios": ratios}, indent=2))


if __name__ == "__main__":
    main()

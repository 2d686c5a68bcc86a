"""Two ranks of one thread each against one process of one thread: the same run, both timed here.

    python -m benchmarks.scaling_check [MODEL ...]

A small random Llama and a small random mixture, or the models that are named; random tokens. Seconds are of the blocks
alone, as the run's report has them: starting Python and writing the checkpoint are what they are with any number of
ranks. CPU seconds are those of rank 0's own thread: waiting for the other rank is not in them, nor is a busy machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

import sarqc
from sarqc.pipeline.distributed import is_leader
from sarqc.pipeline.progress import NoProgress

_COMMON = dict(vocab_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=64)
CONFIGS: dict[str, PreTrainedConfig] = {
    "dense, K = 512 and 1536": LlamaConfig(**_COMMON, hidden_size=512, intermediate_size=1536),
    "16 experts, K = 512 and 384": Qwen3MoeConfig(
        **_COMMON, hidden_size=512, intermediate_size=1024, moe_intermediate_size=384, num_experts=16,
        num_experts_per_tok=2,
    ),
}  # fmt: skip
WINDOWS, SEQLEN = 32, 256
NAMED, TURNS = 8, 4
"""Windows for models that are named, and runs of each kind."""


class Stopwatch(NoProgress):
    """Seconds, and CPU seconds of this thread, from the first block's first stage to the end of the last block."""

    began: tuple[float, float] | None = None
    ended = (0.0, 0.0)

    def stage(self, block: int, name: str) -> None:
        """The first one begins it."""
        self.began = self.began or (time.perf_counter(), time.thread_time())

    def block(self, result: object) -> None:
        """The last one ends it."""
        self.ended = time.perf_counter(), time.thread_time()


def work(model: str, out: str, windows: int) -> None:
    """One rank of a run; rank 0 prints the seconds."""
    torch.set_num_threads(1)
    tokens = torch.randint(0, 512, (windows, SEQLEN), generator=torch.Generator().manual_seed(0))
    watch = Stopwatch()
    sarqc.quantize(model, out, dataset=tokens, device="cpu", progress=watch)
    if is_leader():
        assert watch.began is not None
        print(*(f"{stop - start:.2f}" for start, stop in zip(watch.began, watch.ended)))


def timed(model: str, out: Path, windows: int, ranks: int) -> tuple[float, float]:
    """Seconds and CPU seconds of a run in processes of their own."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *start, "-m", "benchmarks.scaling_check", model, str(out), str(windows)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds, own = map(float, done.stdout.split()[-2:])
    return seconds, own


def compare(name: str, model: str, windows: int, place: Path) -> None:
    """A line: the better of the runs of each kind, taken in turns."""
    taken: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for turn, ranks in product(range(TURNS), taken):
        taken[ranks].append(timed(model, place / f"{ranks}-{turn}", windows, ranks))
    for figure, one, two in zip(("wall", "CPU"), *(map(min, zip(*taken[ranks])) for ranks in taken)):
        print(f"{name}, {figure}: 1 process {one:.1f} s, 2 ranks {two:.1f} s, {one / two:.2f} x", flush=True)
    print(f"all: {taken}", flush=True)


def main(models: Sequence[str]) -> None:
    """A line for each model."""
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate(models):
            compare(model, model, NAMED, Path(folder, str(number)))
        for number, (name, config) in enumerate(CONFIGS.items() if not models else ()):
            place = Path(folder, str(number))
            AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(place / "model")
            compare(name, str(place / "model"), WINDOWS, place)


if __name__ == "__main__":
    given = sys.argv[1:]
    if len(given) == 3 and given[2].isdigit():
        work(given[0], given[1], int(given[2]))
    else:
        main(given)

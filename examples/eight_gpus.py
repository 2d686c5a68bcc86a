"""Quantize with several GPUs of one machine: windows and solving are shared out, one process writes.

    python examples/eight_gpus.py Qwen/Qwen3-32B qwen3-32b-w4 --processes 8

torchrun starts the processes and ends all of them when one dies; the same command then goes on at the last finished
block, with any number of processes. Without GPUs they share the CPU. On several machines, give torchrun its own options
(--nnodes, --rdzv-endpoint) and a model and an output on a disk that all of them see.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence


def command(processes: int, arguments: Sequence[str]) -> list[str]:
    """The line to run: `arguments` are those of `sarqc quantize`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", "sarqc", "quantize", *arguments]


def main(model: str = "smollm2", out: str = "smollm2-w4", *more: str, processes: int = 8) -> int:
    """Returns the exit code of the run. more: further options of `sarqc quantize`."""
    line = command(processes, [model, "-o", out, *more])
    print(" ".join(line))
    return subprocess.run(line).returncode


if __name__ == "__main__":
    given = sys.argv[1:]
    count = 8
    if "--processes" in given:
        at = given.index("--processes")
        count = int(given[at + 1])
        del given[at : at + 2]
    sys.exit(main(*given, processes=count))

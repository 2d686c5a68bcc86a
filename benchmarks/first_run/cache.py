"""Compile, without a GPU, what its first run would compile: `python -m benchmarks.first_run.cache [--minutes 60]`.

nvcc makes the libraries of csrc for sm_90; the kernel tests, run with a driver that launches nothing (`fake_driver`),
make Triton compile their variants. All of it lies in build/gpu-cache, and in build/gpu-cache.tar.gz to be carried: it
must not be larger than 48 MiB. Triton and nvcc have to be of the versions that the GPU's machine has.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.budget import Budget
from benchmarks.first_run.command import ORDER
from benchmarks.machine import ROOT
from benchmarks.ops import OPS
from sarqc_kernels import build
from sarqc_kernels.errors import BackendError

MOST_BYTES = 48 << 20
ARCH = 90
KEPT = (".cubin", ".json")
"""What a launch reads of Triton's cache; the forms between source and machine code stay behind."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_run.cache", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="of compiling (default 60)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-cache")
    parser.add_argument("tests", nargs="*", help="test files; by default those of every operation")
    options = parser.parse_args(arguments)
    out, budget = options.out.resolve(), Budget(options.minutes)
    os.environ |= {"TRITON_CACHE_DIR": str(out / "triton"), "SARQC_CACHE": str(out / "sarqc")}
    for source in sorted(build.sources().glob("*.cu")):
        try:
            print(build.compile_library(source.stem, ARCH), flush=True)
        except BackendError as error:
            print(f"{source.name}: {error}", flush=True)
    files = options.tests or list(dict.fromkeys(file for name in ORDER for file in OPS[name].tests))
    for file in files:
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "benchmarks.first_run.fake_driver",
                   "-p", "no:cacheprovider", "-k", "triton or not (reference or cpu or cuda)", file]  # fmt: skip
        try:
            subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=max(1.0, budget.left()))
        except subprocess.TimeoutExpired:
            print(f"{file}: no time was left; the GPU's machine compiles what is missing", flush=True)
        print(f"[{budget}] {file}: {_count(out)} kernels so far", flush=True)
    size = pack(out, out.with_suffix(".tar.gz"))
    print(f"{out.with_suffix('.tar.gz')}: {size / 2**20:.1f} MiB")
    if size > MOST_BYTES:
        print(f"that is more than {MOST_BYTES >> 20} MiB: name fewer tests")
    return int(size > MOST_BYTES)


def pack(folder: Path, archive: Path) -> int:
    """Everything that a launch reads, in one file; returns its size."""
    with tarfile.open(archive, "w:gz") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and (path.suffix in KEPT or path.is_relative_to(folder / "sarqc")):
                file.add(path, path.relative_to(folder.parent))
    return archive.stat().st_size


def _count(out: Path) -> int:
    return sum(1 for _ in (out / "triton").rglob("*.cubin"))


if __name__ == "__main__":
    sys.exit(main())

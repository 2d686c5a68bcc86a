"""Compile, without a GPU, what its first run would compile: python -m benchmarks.first_run.cache [--triton 3.6.0].

nvcc makes the libraries of csrc for sm_90, one for each set of macros that is tested or timed. Triton makes the jobs of
`benchmarks.aot`, and what a first run asks for: all its parts run here, on a GPU that is not there (`rehearsal`). No
result is right then, so tests fail. All of it lies in build/gpu-cache, and in build/gpu-cache.tar.gz to be carried,
which must not be larger than 48 MiB. --triton is the version of the GPU's machine; nvcc has to be of its version too.
What is there already is kept, so a run that was stopped goes on. Beside them lie the packages of `PACKAGES`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.aot.other import paths_of
from benchmarks.budget import Budget
from benchmarks.first_run import command, portable
from benchmarks.machine import ROOT
from sarqc_kernels import build
from sarqc_kernels.errors import BackendError

MOST_BYTES = 48 << 20
ARCH = 90
KEPT = (".cubin", ".json")
"""What a launch reads of Triton's cache; the forms between source and machine code stay behind."""
GEMV = [(f"SARQC_BITS={bits}", f"SARQC_HALF={half}", "SARQC_SCALE=2") for bits in (4, 3, 2, 8) for half in (0, 1)]
"""Of csrc/gemv.cu: every width for bf16 and fp16, with scales in bf16."""

PACKAGES = ("greenlet",)
"""What whole runs need and a machine with torch, transformers and pytest lacks; taken where it has none of its own."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_run.cache", description=__doc__)
    parser.add_argument("--triton", metavar="VERSION", help="of the GPU's machine, fetched into build/; default: ours")
    parser.add_argument("--python", default="3.12", help="of the GPU's machine (default 3.12)")
    parser.add_argument("--minutes", type=float, default=60.0, help="of compiling (default 60)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-cache")
    parser.add_argument("parts", nargs="*", help="of a first run, by name; by default all")
    options = parser.parse_args(arguments)
    out, budget = options.out.resolve(), Budget(options.minutes)
    version = options.triton or portable.version()
    if portable.made_with(out) not in (version, "unknown"):
        parser.error(f"{out} holds kernels of triton {portable.made_with(out)}: remove it, or give another --out")
    environment = os.environ | {"TRITON_CACHE_DIR": str(out / "triton"), "PYTHONPATH": paths_of(version)}
    out.mkdir(parents=True, exist_ok=True)
    (out / portable.NOTE).write_text(version + "\n")
    _packages(out / portable.SITE, options.python)
    _libraries(out / "sarqc")
    jobs = ["benchmarks.aot", "--no-csrc", "--check-only", "--arch", str(ARCH)]
    _compile(jobs, environment, budget)
    print(f"[{budget}] jobs: {len(portable.kernels(out))} kernels and libraries so far", flush=True)
    with tempfile.TemporaryDirectory(prefix="sarqc-rehearsal-") as scratch:
        every = command.parts(Path(scratch), quick=False, device="auto")
        chosen = [part for part in every if not options.parts or part.name in options.parts]
        command.Run(
            budget, Path(scratch), environment | {portable.REHEARSE: "1", "SARQC_CACHE": str(out / "sarqc")}, out
        ).all(chosen)
    size = pack(out, out.with_suffix(".tar.gz"))
    print(f"{out.with_suffix('.tar.gz')}: {size / 2**20:.1f} MiB")
    if size > MOST_BYTES:
        print(f"that is more than {MOST_BYTES >> 20} MiB: name fewer parts")
    return int(size > MOST_BYTES)


def _packages(folder: Path, python: str) -> None:
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--upgrade",
               "--target", str(folder), "--python-version", python, *platforms]  # fmt: skip
    if subprocess.run([*install, *PACKAGES]).returncode:
        print(f"{', '.join(PACKAGES)} cannot be fetched: the GPU's machine needs its own", flush=True)


def _libraries(folder: Path) -> None:
    os.environ["SARQC_CACHE"] = str(folder)
    for name, defines in (("columns", ()), *(("gemv", macros) for macros in GEMV)):
        try:
            print(build.compile_library(name, ARCH, defines), flush=True)
        except BackendError as error:
            print(f"{name}: {error}", flush=True)


def _compile(module: Sequence[str], environment: dict[str, str], budget: Budget) -> None:
    """Run a module with keys that other Pythons share. What it says of its results is of no interest."""
    run = [sys.executable, "-m", "benchmarks.first_run.portable", *module]
    try:
        subprocess.run(run, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, timeout=max(1.0, budget.left()))
    except subprocess.TimeoutExpired:
        print(f"{module[-1]}: no time was left; the GPU's machine compiles what is missing", flush=True)


def pack(folder: Path, archive: Path) -> int:
    """Everything that a launch reads, in one file; returns its size."""
    with tarfile.open(archive, "w:gz") as file:
        for path in sorted(folder.rglob("*")):
            of_triton = path.is_relative_to(folder / "triton")
            if path.is_file() and (path.suffix in KEPT or not of_triton):
                file.add(path, path.relative_to(folder.parent))
    return archive.stat().st_size


if __name__ == "__main__":
    sys.exit(main())

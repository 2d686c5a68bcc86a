"""CUDA C++ through nvcc: the same questions to ptxas, for each kernel of each file in csrc/."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.aot import sass
from benchmarks.aot.compiler import TOOLS
from benchmarks.aot.table import Built
from sarqc_kernels import build
from sarqc_kernels.errors import BackendError
from sarqc_kernels.w4a16.cuda import BITS

CSRC = Path(__file__).parents[2] / "csrc"
CARDS = ("80", "90a", "100", "120")
VARIANTS = {  # macros of a source that is several libraries
    "gemv": [(f"SARQC_BITS={bits}", f"SARQC_HALF={half}") for bits in BITS for half in (0, 1)],
}
FLAGS = ("-std=c++17", "-O3", "-cubin", "-Xptxas", "-v")


def nvcc() -> tuple[str, str] | None:
    """The compiler and its version; None where there is none."""
    try:
        path = build.nvcc()
    except BackendError:
        return None
    printed = subprocess.run([path, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"release [\d.]+, V([\d.]+)", printed)
    return path, match[1] if match else "unknown"


def works(archs: Sequence[int] = ()) -> list[tuple[Path, str, tuple[str, ...]]]:
    """What there is to compile: each file for each card (of `archs`; empty: all), with each set of its macros."""
    return [
        (source, card, macros)
        for source in sorted(CSRC.glob("*.cu"))
        for card in CARDS
        if not archs or int(card.rstrip("a")) in archs
        for macros in VARIANTS.get(source.stem, [()])
    ]


def compile_file(compiler: str, source: Path, card: str, macros: tuple[str, ...] = ()) -> list[Built]:
    """Compile one file for one card: a line for each kernel in it, or one that says why it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        architecture = f"-gencode=arch=compute_{card},code=sm_{card}"
        command = [compiler, *FLAGS, architecture, *(f"-D{macro}" for macro in macros), "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[0]
            return [Built(source.name, f"sm_{card}", 0, 0, 0, 0, {}, (f"does not compile: {reason}",))]
        opcodes = _opcodes_by_kernel(cubin)
    return [_line(source, card, block, opcodes) for block in done.stderr.split("Compiling entry function ")[1:]]


def listings(compiler: str, source: Path, card: str) -> dict[str, list[str]]:
    """Machine code of each kernel of a file, by its readable name. Raises CalledProcessError where nvcc fails."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        architecture = f"-gencode=arch=compute_{card},code=sm_{card}"
        subprocess.run([compiler, *FLAGS, architecture, "-o", str(cubin), str(source)], check=True, capture_output=True)
        result = sass.listing_of(cubin.read_bytes(), TOOLS)
    return {_readable(name): lines for name, lines in result.items()}


def _line(source: Path, card: str, block: str, opcodes: dict[str, dict[str, int]]) -> Built:
    def number(pattern: str) -> int:
        match = re.search(pattern, block)
        return int(match[1]) if match else 0

    mangled = block.split("'")[1]
    stack, spilled = number(r"(\d+) bytes stack frame"), number(r"(\d+) bytes spill stores")
    counts = opcodes.get(mangled, {})
    problems = [f"{stack} bytes of stack, {spilled} spilled"] if stack or spilled else []
    name = f"{source.name} {_readable(mangled)}"
    registers, shared = number(r"Used (\d+) registers"), number(r"(\d+) bytes smem")
    return Built(name, f"sm_{card}", 0, registers, stack, shared, counts, tuple(problems))


def _opcodes_by_kernel(cubin: Path) -> dict[str, dict[str, int]]:
    listing = subprocess.run([str(TOOLS / "nvdisasm"), "-c", str(cubin)], check=True, capture_output=True, text=True)
    sections = re.split(r"\.section\s+\.text\.(\w+)", listing.stdout)
    return {name: dict(sass.opcodes(body.splitlines())) for name, body in zip(sections[1::2], sections[2::2])}


def _readable(mangled: str) -> str:
    """The name as C++ spells it, without arguments where a demangler is at hand."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return mangled
    printed = subprocess.run([tool, mangled], check=True, capture_output=True, text=True).stdout.strip()
    return re.sub(r"\((?!.*<).*\)$", "", printed).removeprefix("void ")

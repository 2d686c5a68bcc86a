"""Reads a compiled kernel with the disassembler that comes with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.aot import listing
from benchmarks.aot.hazards import overwritten

TENSOR_CORE = ("HGMMA", "UTCHMMA", "HMMA", "IMMA")
COUNTED = (*TENSOR_CORE, "UTMALDG", "LDGSTS", "LDL", "STL", "SHFL", "BAR", "WARPGROUP")
"""Opcodes in the table: products on tensor cores, bulk and async copies, local memory, shuffles, barriers, waits for
products."""

FORMS = {
    "HGMMA from registers": re.compile(r"HGMMA\S*\s+R\d+, R\d+,"),
    "16-byte LDGSTS": re.compile(r"LDGSTS\S*\.128"),
}
"""Instructions of a certain form, counted a second time under a name of their own: a product whose first operand is in
registers, and an asynchronous copy of the widest kind."""


@dataclass(frozen=True)
class MachineCode:
    """registers: of one thread. stack: bytes of one thread in local memory, which is where spills go. overwritten: as
    in `hazards`."""

    registers: int
    stack: int
    opcodes: Counter[str]
    overwritten: int


def read(cubin: bytes, tools: Path) -> MachineCode:
    """Take a cubin of one kernel apart. tools: the folder with cuobjdump and nvdisasm."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", path)
        lines = _run(tools / "nvdisasm", "-c", path).splitlines()
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump prints no resource usage:\n{usage}")
    return MachineCode(int(match[1]), int(match[2]), opcodes(lines), overwritten(lines))


def opcodes(lines: Iterable[str]) -> Counter[str]:
    """How often each opcode of `COUNTED` and each of `FORMS` occurs; `HGMMA.64x128x16.F32.BF16 ...` counts as HGMMA."""
    counts: Counter[str] = Counter()
    for line in lines:
        match = re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]+)", line)
        if match and match[1] in COUNTED:
            counts[match[1]] += 1
            counts.update(name for name, form in FORMS.items() if form.search(line))
    return counts


def loops(lines: Iterable[str]) -> list[Counter[str]]:
    """How often each opcode occurs in each loop of a disassembled kernel; an outer loop counts what its inner loops
    hold once."""
    items, found = listing.loops(lines)
    return [Counter(items[place].stem for place in loop) for loop in found]


def listing_of(cubin: bytes, tools: Path) -> dict[str, list[str]]:
    """The lines of each kernel of a cubin, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = _run(tools / "nvdisasm", "-c", path)
    sections = re.split(r"\.section\s+\.text\.(\w+)", text)
    return {name: body.splitlines() for name, body in zip(sections[1::2], sections[2::2])}


def _run(tool: Path, *arguments: object) -> str:
    command = [str(tool), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

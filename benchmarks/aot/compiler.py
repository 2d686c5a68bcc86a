"""Builds one job for a card that is not here, and says what is wrong with its machine code."""

from __future__ import annotations

import re
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.aot import sass
from benchmarks.aot.jobs import AotJob
from benchmarks.aot.table import Built
from sarqc_kernels.device import Device

FROM_REGISTERS = re.compile(r"ttg\.local_alloc %")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(job: AotJob):
    """The kernel of a job as Triton compiles it. Raises what the compiler raises."""
    source = ASTSource(job.kernel, dict(job.signature), dict(job.constants), dict(job.attributes))
    return triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=dict(job.options))


def build(job: AotJob) -> Built:
    """Compile and check a job; a compiler that fails is a problem of the line, not the end of the run."""
    warps = int(job.options["num_warps"])
    try:
        kernel = compiled(job)
    except Exception as error:  # noqa: BLE001  (whatever a compiler raises is what the table has to say)
        message = str(error.__cause__ or error).strip().splitlines() or ["no message"]
        reason = f"does not compile: {type(error).__name__}: {message[-1]}"
        return Built(job.name, f"sm_{job.arch}", warps, 0, 0, 0, {}, (reason,))
    code = sass.read(kernel.asm["cubin"], TOOLS)
    shared = int(kernel.metadata.shared)
    problems = tuple(_problems(job, code, shared, kernel.asm["ttgir"]))
    return Built(job.name, f"sm_{job.arch}", warps, code.registers, code.stack, shared, dict(code.opcodes), problems)


def _problems(job: AotJob, code: sass.MachineCode, shared: int, layouts: str) -> list[str]:
    """layouts: the last form of the kernel in which shared memory still has names."""
    problems = []
    # What is stored there and never read is no spill: ptxas of triton 3.6 leaves some.
    if code.opcodes["LDL"] or (code.stack and not code.opcodes["STL"]):
        problems.append(f"{code.stack} bytes of a thread in local memory")
        problems += [f"{code.opcodes[opcode]} x {opcode}" for opcode in ("LDL", "STL") if code.opcodes[opcode]]
    if code.overwritten:
        problems.append(f"{code.overwritten} x a register written that a product under way reads")
    limit = Device(job.arch, multiprocessors=1).shared_bytes
    if shared > limit:
        problems.append(f"{shared} bytes of shared memory, the card has {limit}")
    problems += [f"no {opcode}" for opcode in job.instructions if not code.opcodes[opcode]]
    stored = code.opcodes["HGMMA"] - code.opcodes["HGMMA from registers"]
    if "HGMMA from registers" in job.instructions and stored:
        problems.append(f"{stored} x HGMMA with both operands from shared memory")
    copied = len(FROM_REGISTERS.findall(layouts))
    if "HGMMA from registers" in job.instructions and copied:
        problems.append(f"{copied} x registers to shared memory, on the way to a register of another thread")
    return problems

"""A few kernels through the ahead-of-time check, in a process that compiles; and what the check itself would miss."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.aot import hazards, sass

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--check-only", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize(
    ("arguments", "kernels"),
    [
        (("--room", "gram", "--match", "accumulate bf16 128x128", "--arch", "80", "--arch", "90"), 2),
        (("--room", "gram", "--match", "finalize", "--arch", "90"), 2),
        (("--room", "w4a16", "--match", "dot 4 bits 16x128 split1 bf16 g", "--arch", "90"), 4),
        (("--room", "w4a16", "--match", "dot 4 bits 128x256 split1 persistent bf16 g128", "--arch", "90"), 1),
    ],
    ids=["accumulate", "finalize", "product", "persistent"],
)
def test_kernels_compile_without_spills(arguments: tuple[str, ...], kernels: int) -> None:
    done = check(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kernels} kernels, 0 with problems" in done.stdout


JOBS = """
from benchmarks.aot import jobs
from benchmarks.aot.jobs import Launch, asked_for
from benchmarks.fake_gpu import H200
for arch in (90, 120):
    (job,) = jobs.collect(["w4a16"], "dot 4 bits 32x128 split2 bf16 g128s", [arch])
    print(arch, job.signature["tiles_per_group"], job.signature["M"], job.signature["x"], job.options["num_warps"])
(gram,) = jobs.collect(["gram"], "accumulate bf16 128x256", [90])
print(gram.signature["x_n"], gram.signature["splits"], sorted(gram.instructions))
print(asked_for(lambda: None, H200))
"""


def test_jobs_are_what_launches_ask_the_compiler_for() -> None:
    """As a GPU would specialise them: a size of 1 is a constant where it may be, bulk copies have descriptors."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", JOBS], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout.splitlines() == [
        "90 constexpr i32 *bf16 4",
        "120 constexpr i32 *bf16 4",
        "tensordesc<bf16[64, 256]> i32 ['HGMMA', 'UTMALDG']",
        "[]",
    ], done.stderr


def test_a_weight_that_changes_its_thread_is_seen() -> None:
    """The last form with layouts: a buffer that registers fill is one; one that copies fill, or none, is not."""
    compiler = pytest.importorskip("benchmarks.aot.compiler")
    loop = """
      %w = ttg.local_alloc %weight : (tensor<128x16xbf16, #blocked>) -> !ttg.memdesc<128x16xbf16, #shared, #smem>
      %a = ttg.local_alloc : () -> !ttg.memdesc<2x128x16xi32, #shared, #smem, mutable>
    """
    assert len(compiler.FROM_REGISTERS.findall(loop)) == 1


@pytest.mark.parametrize(
    ("stack", "opcodes", "found"),
    [
        (0, {}, []),
        (8, {"STL": 2}, []),  # written and never read
        (8, {"STL": 2, "LDL": 1}, ["8 bytes of a thread in local memory", "1 x LDL", "2 x STL"]),
        (8, {}, ["8 bytes of a thread in local memory"]),  # nobody sees what reads it
    ],
)
def test_a_spill_is_what_is_read_again(stack: int, opcodes: dict[str, int], found: list[str]) -> None:
    compiler = pytest.importorskip("benchmarks.aot.compiler")
    job = compiler.AotJob("", None, 90, {}, {}, {}, {}, ())
    assert compiler._problems(job, sass.MachineCode(32, stack, Counter(opcodes), 0), 0, "") == found


def test_opcodes_are_counted_by_their_stem() -> None:
    listing = """
        /*0190*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4].tnspA, R24, gsb0 ;
        /*01a0*/              @!P0 LDL.LU R3, [R1+0x4] ;
        /*01b0*/             @!UP1 UTMALDG.2D [UR8], [UR6] ;
        /*01c0*/              @PT  STL [R1], R2 ;
        /*01d0*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*01e0*/                   HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR20], R24, gsb0 ;
        /*01f0*/                   LDGSTS.E.BYPASS.128 [R92], desc[UR18][R4.64], !P1 ;
        /*0200*/                   LDGSTS.E.64 [R90], desc[UR18][R8.64], P3 ;
        /*0210*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0220*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    """
    forms = {"HGMMA from registers": 1, "16-byte LDGSTS": 1}
    stems = {"HGMMA": 2, "LDL": 1, "UTMALDG": 1, "STL": 1, "LDGSTS": 2, "WARPGROUP": 2}
    assert sass.opcodes(listing.splitlines()) == stems | forms


LOOP = """
.L_x_1:
        /*0000*/                   LDS.64 R88, [R123+UR9] ;
        /*0010*/                   HMUL2.BF16_V2 R116, R88, R113.reuse.H0_H0 ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, R116, gdesc[UR20], R24, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x{left} ;
        /*0040*/                   ISETP.GE.U32.AND P5, PT, R118.reuse, R130, PT ;
        /*0050*/                   LDS.128 R{behind}, [R123+UR9+0x10] ;
        /*0060*/               @P5 BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize(
    ("left", "behind", "early"),
    [(0, 100, 0), (0, 113, 0), (1, 100, 1), (1, 113, 2), (1, 112, 1), (1, 120, 1)],
    ids=["waited for", "waited for, same register", "next round", "and at once", "four beside", "four behind"],
)
def test_a_register_that_a_product_still_reads_is_not_written(left: int, behind: int, early: int) -> None:
    """Registers 116 to 119 are the first operand; `left` products may be under way behind the wait."""
    listing = LOOP.format(left=left, behind=behind).splitlines()
    assert hazards.overwritten(listing) == early
    assert hazards.overwritten(line for line in listing if "BRA" not in line) == 0

"""A few kernels through the ahead-of-time check, in a process that compiles; and what the check itself would miss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.aot import sass

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--check-only", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--room", "gram", "--match", "accumulate bf16 128x128", "--arch", "80", "--arch", "90"),
        ("--room", "gram", "--match", "finalize", "--arch", "90"),
    ],
    ids=["accumulate", "finalize"],
)
def test_gram_kernels_compile_without_spills(arguments: tuple[str, ...]) -> None:
    done = check(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kernels, 0 with problems" in done.stdout


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
    """
    forms = {"HGMMA from registers": 1, "16-byte LDGSTS": 1}
    stems = {"HGMMA": 2, "LDL": 1, "UTMALDG": 1, "STL": 1, "LDGSTS": 2}
    assert sass.opcodes(listing.splitlines()) == stems | forms

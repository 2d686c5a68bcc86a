"""Instructions of the loops that matter, held to a committed table: `python -m benchmarks.aot.counts [--accept]`.

A count is no time, but where a loop is bound by instructions it is the time. Each entry names a kernel, what its loop
must hold to be the one that is meant, and what one round of it does. The table, results/sass-counts.json, has the count
and the one before it; a rise of more than 5 % fails until it is accepted with a reason in the commit. sm_90 alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "sass-counts.json"
CSRC = Path(__file__).parents[2] / "csrc"
RISE = 1.05
ARCH, CARD = 90, "90a"


@dataclass(frozen=True)
class Count:
    """One loop. kernel: the name of a job, or of a kernel of a file in csrc. holds: opcodes that the loop has at least
    so often; of the loops that do, the shortest is meant. unit: what one round does."""

    name: str
    kernel: str
    unit: str
    holds: Mapping[str, int]
    room: str = ""
    file: str = ""


COUNTS = (
    Count("columns.cu, search of a grid", "columns<true, true>", "2 columns, 8 trials, a row",
          {"FRND": 16, "FFMA": 16}, file="columns.cu"),
    Count("columns.cu, earlier columns", "columns<true, true>", "4 columns onto 16, a row", {"FFMA": 64},
          file="columns.cu"),
    Count("columns.cu, micro-panel", "columns<true, false>", "16 columns, and 4 earlier ones, a row",
          {"F2I": 16, "FFMA": 200}, file="columns.cu"),
    Count("columns.cu, free micro-panel", "columns<false, false>", "16 columns, and 4 earlier ones, a row",
          {"STG": 16, "FFMA": 200}, file="columns.cu"),
    Count("columns pull", "columns pull 64x64x32", "32 columns onto 64 x 64", {"HGMMA": 1}, room="columns"),
    Count("columns, coordinate descent", "columns descend", "32 columns onto 64 x 32, update of E H",
          {"HGMMA": 1}, room="columns"),
    Count("gram 128 x 128", "gram accumulate bf16 128x128x64 w8 s4 bulk", "64 rows", {"HGMMA": 4}, room="gram"),
    Count("gram 128 x 256", "gram accumulate bf16 128x256x64 w8 s4 bulk", "64 rows", {"HGMMA": 4}, room="gram"),
    Count("gemv.cu, 1 to 8 tokens", "gemv<4, false, 1, true, false>", "2 tiles of 32 x 128: 256 weights of a lane",
          {"HMMA": 32}, file="gemv.cu"),
    Count("gemv.cu, 9 to 16 tokens", "gemv<4, false, 2, true, false>", "a tile of 32 x 128: 128 weights of a lane",
          {"HMMA": 32}, file="gemv.cu"),
    Count("gemv.cu, 1 to 8 tokens, zeros", "gemv<4, false, 1, true, true>",
          "2 tiles of 32 x 128: 256 weights of a lane", {"HMMA": 32}, file="gemv.cu"),
    Count("w4a16 dot, 16 tokens", "w4a16 dot 4 bits 16x128 split2 bf16 g128s", "a tile of 128 x 128, a warp of 4",
          {"HGMMA": 8}, room="w4a16"),
    Count("w4a16 dot, 64 tokens", "w4a16 dot 4 bits 64x128 split2 bf16 g128s", "a tile of 128 x 128, a warp of 8",
          {"HGMMA": 8}, room="w4a16"),
    Count("w4a16 dot, 128 tokens", "w4a16 dot 4 bits 128x128 split2 bf16 g128s", "a tile of 128 x 128, a warp of 8",
          {"HGMMA": 8}, room="w4a16"),
    Count("w4a16 dot, 144 tokens", "w4a16 dot 4 bits 144x128 split2 bf16 g128s", "a tile of 128 x 128, a warp of 8",
          {"HGMMA": 8}, room="w4a16"),
    Count("w4a16 persistent", "w4a16 dot 4 bits 128x256 split1 persistent bf16 g128s",
          "a tile of 256 x 128, a warp of 8",
          {"HGMMA": 8}, room="w4a16"),
)  # fmt: skip


def meant(loops: Sequence[Counter[str]], holds: Mapping[str, int]) -> int:
    """Instructions of the shortest loop that holds all of these. Raises ValueError where none does."""
    values = [loop.total() for loop in loops if all(loop[opcode] >= times for opcode, times in holds.items())]
    if not values:
        raise ValueError(f"no loop holds {dict(holds)}")
    return min(values)


def measured() -> dict[str, int]:
    """The count of every entry, compiled now; entries of csrc are left out where there is no nvcc."""
    from benchmarks.aot import compiler, csrc, jobs, sass

    nvcc = csrc.nvcc()
    files = {} if nvcc is None else {
        name: csrc.listings(nvcc[0], CSRC / name, CARD) for name in {each.file for each in COUNTS if each.file}
    }  # fmt: skip
    counts = {}
    for each in COUNTS:
        if each.file and each.file not in files:
            continue
        if each.file:
            lines = files[each.file][each.kernel]
        else:
            job = next(job for job in jobs.collect([each.room], each.kernel, [ARCH]) if job.name == each.kernel)
            (lines,) = sass.listing_of(compiler.compiled(job).asm["cubin"], compiler.TOOLS).values()
        counts[each.name] = meant(sass.loops(lines), each.holds)
    return counts


def risen(now: Mapping[str, int], known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What has more instructions than the table allows, or is not in it, a line each."""
    lines = []
    for name, count in now.items():
        if name not in known:
            lines.append(f"{name}: {count} instructions, and the table has no such entry: --accept it")
        elif count > RISE * known[name]["instructions"]:
            allowed = known[name]["instructions"]
            lines.append(f"{name}: {count} instructions, {allowed} in the table: --accept it, and say why")
    return lines


def accepted(now: Mapping[str, int], known: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The table with what is counted now; what was not counted stays as it is."""
    units = {each.name: each.unit for each in COUNTS}
    table = {}
    for name, unit in units.items():
        old = known.get(name, {})
        count = now.get(name, old.get("instructions"))
        before = old.get("before") if count == old.get("instructions") else old.get("instructions")
        if count is not None:
            table[name] = {"instructions": count, "before": before, "unit": unit}
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot.counts", description=__doc__)
    parser.add_argument("--accept", action="store_true", help="write what is counted into the table")
    options = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    now = measured()
    for name, count in now.items():
        print(f"{count:5}  {known.get(name, {}).get('instructions', '-'):>5} in the table  {name}")
    if options.accept:
        RESULTS.write_text(json.dumps(accepted(now, known), indent=1) + "\n")
        return 0
    bad = risen(now, known)
    print("\n".join(bad))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

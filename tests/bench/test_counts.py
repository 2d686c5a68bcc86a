"""Counts of machine code: loops are found, a rise is told, and the committed table has every entry."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from benchmarks.aot import counts, sass, table

LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   FADD R2, R2, R1 ;
.L_x_2:
        /*0020*/                   LDS R4, [R3] ;
        /*0030*/                   FFMA R2, R4, R1, R2 ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*0070*/                   EXIT ;
.L_x_4:
        /*0080*/                   BRA `(.L_x_4);
""".splitlines()


def test_loops_are_what_a_branch_goes_back_over() -> None:
    assert sass.loops(LISTING) == [
        Counter({"LDS": 1, "FFMA": 1, "BRA": 1}),
        Counter({"FADD": 1, "LDS": 1, "FFMA": 1, "BRA": 2}),
    ]


def test_the_shortest_loop_that_holds_enough_is_meant() -> None:
    loops = sass.loops(LISTING)
    assert counts.meant(loops, {"FFMA": 1}) == 3 and counts.meant(loops, {"FADD": 1}) == 5
    with pytest.raises(ValueError, match="no loop holds"):
        counts.meant(loops, {"FFMA": 2})


def test_a_rise_of_more_than_five_percent_fails() -> None:
    known = {"a": {"instructions": 100}}
    assert counts.risen({"a": 105}, known) == [] and counts.risen({"a": 60}, known) == []
    assert "106 instructions, 100 in the table" in counts.risen({"a": 106}, known)[0]
    assert "no such entry" in counts.risen({"b": 1}, known)[0]


def test_accepting_keeps_what_was_before() -> None:
    name = counts.COUNTS[0].name
    table = counts.accepted({name: 50}, {name: {"instructions": 80, "before": 90}})
    assert (table[name]["instructions"], table[name]["before"]) == (50, 80)
    again = counts.accepted({name: 50}, table)
    assert again == table
    assert counts.accepted({}, table)[name]["instructions"] == 50  # not counted: no nvcc


def test_the_committed_table_has_every_entry() -> None:
    known = json.loads(counts.RESULTS.read_text())
    assert set(known) == {each.name for each in counts.COUNTS}
    assert all(isinstance(each["instructions"], int) for each in known.values())
    assert known["columns.cu, search of a grid"]["instructions"] <= 170  # 442 where it divided in the loop


def test_a_run_for_one_card_replaces_its_lines_alone() -> None:
    built = {arch: table.Built("a b", arch, 4, 64, 0, 0, {"HMMA": 2}, ()) for arch in ("sm_80", "sm_90")}
    both = table.render("triton", list(built.values()))
    assert both.splitlines()[2].startswith("2 kernels for sm_80, sm_90, 0 with problems")
    spilled = built["sm_90"]._replace(stack=8, problems=("8 bytes",))
    again = table.render("triton", [spilled], both)
    assert [line.split(" | ")[1] for line in again.splitlines()[6:]] == ["sm_80", "sm_90"]
    assert "2 kernels for sm_80, sm_90, 1 with problems" in again and "| 8 bytes |" in again
    assert table.render("triton", [built["sm_90"]], again) == both

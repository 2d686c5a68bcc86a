"""Registers that are written too early: a product under way (wgmma) still reads its first operand from them.

ptxas before 13.3 takes those registers for free once the product has been issued (triton-lang/triton#9433), though the
program waits for its end before it writes them. No interpreter shows that, and on a GPU it depends on timing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.aot.listing import Instruction, loops

_OPERAND = re.compile(r"R\d+, R(\d+), gdesc")
_WAIT = re.compile(r"gsb0, 0x([0-9a-f]+)")
_RESULT = re.compile(r"(?:U?P\w+,\s*)*R(\d+)\b")
_WITHOUT_RESULT = ("ST", "BRA", "BAR", "RED", "DEPBAR", "LDGSTS", "LDGDEPBAR", "SYNCS", "UTMA", "ISETP", "FSETP")
_OPERAND_REGISTERS = 4


def overwritten(listing: Iterable[str]) -> int:
    """How many instructions of the loops of a disassembled kernel write a register that a product still reads."""
    return sum(_early(body) for body in _bodies(listing))


def _bodies(listing: Iterable[str]) -> Iterator[Sequence[Instruction]]:
    """Loops with products, without those that hold another one."""
    items, found = loops(listing)
    with_products = [loop for loop in found if any(items[place].stem == "HGMMA" for place in loop)]
    for loop in with_products:
        if not any(other != loop and other[0] in loop and other[-1] in loop for other in with_products):
            yield items[loop.start : loop.stop]


def _written(one: Instruction) -> range:
    """Registers that an instruction writes."""
    match = _RESULT.match(one.operands)
    if match is None or one.opcode.startswith(_WITHOUT_RESULT):
        return range(0)
    parts = one.opcode.split(".")
    wide = 4 if "128" in parts or parts[-1] == "4" else 2 if {"64", "WIDE"} & {*parts} or parts[-1] == "2" else 1
    return range(int(match[1]), int(match[1]) + wide)


def _early(body: Sequence[Instruction]) -> int:
    """In the second round of a loop, when products of the first may be under way."""
    under_way: list[range] = []
    early: set[int] = set()
    for place, one in enumerate([*body, *body]):
        if one.stem == "HGMMA":
            operand = _OPERAND.match(one.operands)
            first = int(operand[1]) if operand else 0
            under_way.append(range(first, first + _OPERAND_REGISTERS) if operand else range(0))
        elif one.opcode.startswith("WARPGROUP.DEPBAR") and (wait := _WAIT.search(one.operands)):
            left = int(wait[1], 16)
            under_way = under_way[len(under_way) - left :] if left else []
        elif any(register in product for register in _written(one) for product in under_way):
            early.add(place % len(body))
    return len(early)

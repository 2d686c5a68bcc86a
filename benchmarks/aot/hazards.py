"""Registers that are written too early: a product under way (wgmma) still reads its first operand from them.

ptxas before 13.3 takes those registers for free once the product has been issued (triton-lang/triton#9433), though the
program waits for its end before it writes them. No interpreter shows that, and on a GPU it depends on timing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
_LABEL = re.compile(r"^\s*(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_OPERAND = re.compile(r"R\d+, R(\d+), gdesc")
_WAIT = re.compile(r"gsb0, 0x([0-9a-f]+)")
_RESULT = re.compile(r"(?:U?P\w+,\s*)*R(\d+)\b")
_WITHOUT_RESULT = ("ST", "BRA", "BAR", "RED", "DEPBAR", "LDGSTS", "LDGDEPBAR", "SYNCS", "UTMA", "ISETP", "FSETP")
_OPERAND_REGISTERS = 4


@dataclass(frozen=True)
class Instruction:
    """opcode: with its modifiers. operands: as they are written."""

    opcode: str
    operands: str

    @property
    def written(self) -> range:
        """Registers that it writes."""
        match = _RESULT.match(self.operands)
        if match is None or self.opcode.startswith(_WITHOUT_RESULT):
            return range(0)
        parts = self.opcode.split(".")
        wide = 4 if "128" in parts or parts[-1] == "4" else 2 if {"64", "WIDE"} & {*parts} or parts[-1] == "2" else 1
        return range(int(match[1]), int(match[1]) + wide)


def overwritten(listing: Iterable[str]) -> int:
    """How many instructions of the loops of a disassembled kernel write a register that a product still reads."""
    return sum(_early(body) for body in _bodies(listing))


def _bodies(listing: Iterable[str]) -> Iterator[Sequence[Instruction]]:
    """Loops with products, without those that hold another one."""
    labels: dict[str, int] = {}
    items: list[Instruction] = []
    spans: list[tuple[int, int]] = []
    for line in listing:
        if label := _LABEL.match(line):
            labels[label[1]] = len(items)
        elif match := _LINE.search(line):
            items.append(Instruction(match[1], match[2]))
            target = _TARGET.search(match[2])
            if match[1].startswith("BRA") and target and target[1] in labels:
                spans.append((labels[target[1]], len(items)))
    with_products = [span for span in spans if any(one.opcode.startswith("HGMMA") for one in items[slice(*span)])]
    for first, last in with_products:
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in with_products):
            yield items[first:last]


def _early(body: Sequence[Instruction]) -> int:
    """In the second round of a loop, when products of the first may be under way."""
    under_way: list[range] = []
    early: set[int] = set()
    for place, one in enumerate([*body, *body]):
        if one.opcode.startswith("HGMMA"):
            operand = _OPERAND.match(one.operands)
            first = int(operand[1]) if operand else 0
            under_way.append(range(first, first + _OPERAND_REGISTERS) if operand else range(0))
        elif one.opcode.startswith("WARPGROUP.DEPBAR") and (wait := _WAIT.search(one.operands)):
            left = int(wait[1], 16)
            under_way = under_way[len(under_way) - left :] if left else []
        elif any(register in product for register in one.written for product in under_way):
            early.add(place % len(body))
    return len(early)
